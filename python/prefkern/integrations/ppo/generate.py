"""Sampling of responses from the policy."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefkern import check
from prefkern.check import require
from prefkern.integrations.ppo import models, names
from prefkern.integrations.ppo.rollout import Rows
from prefkern.integrations.ppo.state import State
from prefkern.integrations.ppo.tokens import Ids, ids_in

WHERE = "PPOTrainer.generate"
_SHAPES = {"return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"}
_OTHER = dict.fromkeys(_SHAPES, "responses alone are returned; call trainer.model.policy.generate")


@torch.no_grad()
def generate(state: State, queries: list[Ids], **options: Any) -> list[Tensor]:
    """One response for each query: token ids up to and with the stop token, on the CPU. Options are those of
    ``transformers.GenerationConfig``."""
    transformers = require("transformers", "PPOTrainer.generate", "pip install 'prefkern[ppo]'")
    args = state.args
    _check_options(options, transformers)
    settings: dict[str, Any] = {
        "max_new_tokens": args.response_length,
        "do_sample": True,
        "temperature": args.temperature,
        "top_k": 0,
        "pad_token_id": state.pad_token_id,
        "eos_token_id": state.stop_token_ids,
        **options,
    }
    stops = ids_in(WHERE, "eos_token_id", settings["eos_token_id"], state.limits.vocabulary)
    settings["eos_token_id"] = list(stops) or None
    if not settings["do_sample"]:
        for name in ("temperature", "top_k"):
            if name not in options:
                del settings[name]
    longest = max(len(query) for query in queries) + settings["max_new_tokens"]
    if state.limits.positions is not None and longest > state.limits.positions:
        check.fail(
            WHERE,
            f"the longest query and {settings['max_new_tokens']} new tokens must fit the model's "
            f"{state.limits.positions} positions, got {longest}: shorten the queries or response_length",
        )
    model = state.model if state.sharded else state.accelerator.unwrap_model(state.model)
    trained = model.training
    model.eval()
    responses: list[Tensor] = [torch.empty(0)] * len(queries)
    policy = state.accelerator.unwrap_model(state.model).policy
    pads = models.ignores_left_padding(policy)
    if state.sharded and not pads and len({len(query) for query in queries}) > 1:
        check.fail(WHERE, "queries must be of one length where FSDP2 shards a model that padding on the left changes")
    batches = _batches(queries, args.local_rollout_forward_batch_size, pads)
    try:
        with models.plain_generation(policy, transformers):
            for rows in batches:
                input_ids, attention_mask = _left_padded([queries[i] for i in rows], state.pad_token_id)
                output = model.generate(
                    input_ids=input_ids.to(state.device),
                    attention_mask=attention_mask.to(state.device),
                    generation_config=transformers.GenerationConfig(**settings),
                    **({"synced_gpus": True} if state.sharded else {}),
                )
                for i, row in zip(rows, output[:, input_ids.shape[1] :].cpu(), strict=True):
                    responses[i] = _until_stop(row, stops)
    finally:
        model.train(trained)
    return responses


def _check_options(options: dict[str, Any], transformers: Any) -> None:
    """transformers takes names that it does not know and leaves them alone."""
    known = vars(transformers.GenerationConfig())
    names.refuse_unknown(WHERE, options, known.keys() - names.GENERATE.keys() - _SHAPES, names.GENERATE | _OTHER)


def _batches(queries: list[Ids], size: int, pads: bool) -> list[Rows]:
    """Rows of similar length; of one length for a model that padding on the left would lead to other samples."""
    lengths = np.array([len(query) for query in queries])
    order = np.argsort(lengths, kind="stable")
    alike = [order] if pads else np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1)
    return [rows[start : start + size] for rows in alike for start in range(0, len(rows), size)]


def _left_padded(rows: list[Ids], pad_token_id: int) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        input_ids[index, width - len(row) :] = torch.from_numpy(row)
        attention_mask[index, width - len(row) :] = 1
    return input_ids, attention_mask


def _until_stop(row: Tensor, stops: tuple[int, ...]) -> Tensor:
    ends = torch.isin(row, torch.tensor(stops, dtype=row.dtype)).nonzero().flatten().tolist()
    return row[: ends[0] + 1].clone() if ends else row.clone()
