"""The accelerator of a trainer, whatever an earlier trainer of the same process left behind."""

import os
from typing import Any

from prefkern.integrations.ppo.config import PPOConfig


def make_accelerator(accelerate: Any, args: PPOConfig) -> Any:
    """An ``Accelerator`` of the package, in the precision of the options, else of accelerate's configuration.

    Accelerate keeps one precision for a process: without an explicit one this trainer would take over that of a TRL
    trainer before it (bf16 by TRL's default), and with another one accelerate asks for a new process. As transformers'
    trainers do, a state with another precision is begun anew; the process group stays.
    """
    state = accelerate.state.AcceleratorState
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if state._shared_state and state().mixed_precision != precision:
        state._reset_state()
    return accelerate.Accelerator(mixed_precision=precision, log_with=args.report_to, project_dir=args.output_dir)
