"""PPO for a language model. `PPOTrainer.step` is the algorithm, from a rollout to the update."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefkern import check
from prefkern.check import require
from prefkern.integrations.ppo import advantages, checkpoint, episodes, generate, loop, names, stats, tokens
from prefkern.integrations.ppo.config import PPOConfig
from prefkern.integrations.ppo.optimise import optimise
from prefkern.integrations.ppo.rollout import Rollout, deal
from prefkern.integrations.ppo.state import State

WHERE = "PPOTrainer"


class PPOTrainer(State):
    """Proximal policy optimisation, https://arxiv.org/abs/1707.06347, of a causal language model with a value head.

    ``step`` takes queries, responses and rewards; ``train`` generates and scores by itself. Log-probabilities and
    entropies come from hidden states without logits over the vocabulary, for policy and reference alike; advantages are
    computed on the CPU, in Rust. One process or several (DDP, FSDP2) by accelerate's own configuration: each passes its
    own episodes, all see the statistics of all, and the result is that of one process with all of them.

    Args:
        model: the policy, a causal language model of transformers, or a peft model with an adapter. Dropout is switched
            off.
        ref_model: the reference; None: see ``PPOConfig.reference``.
        tokenizer: for strings, and for the ids of padding and of the end; None where everything is token ids.
        args: the options.
        value_model: a separate value function, such as ``AutoModelForSequenceClassification`` with one label; by
            default a linear head on the policy's own trunk, which costs no pass of its own.
        optimizer: in place of AdamW, over parameters of the model.
        accelerator: in place of ``Accelerator(mixed_precision=..., log_with=...)``; pass your own where the process
            trains something else at the same time, as accelerate keeps one precision for all.

    Raises:
        TypeError, ValueError: for what cannot be used, with its name; MissingDependency: without accelerate.
    """

    @names.answered(WHERE, names.TRAINER)
    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        tokenizer: Any = None,
        args: PPOConfig | None = None,
        *,
        value_model: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        accelerator: Any = None,
    ) -> None:
        accelerate = require("accelerate", "PPOTrainer", "pip install 'prefkern[ppo]'")
        args = PPOConfig() if args is None else args
        if any(type(each).__name__ == "PPOConfig" for each in (model, ref_model, tokenizer)):
            check.fail_type(
                WHERE, "the order is PPOTrainer(model, ref_model, tokenizer, args), got the options elsewhere"
            )
        if not isinstance(args, PPOConfig):
            check.fail_type(WHERE, f"args must be a PPOConfig, got {type(args).__name__}")
        super().__init__(accelerate, args, model, ref_model, tokenizer, value_model, optimizer, accelerator)

    # ------------------------------------------------------------------------------------------------ the algorithm

    @names.answered("PPOTrainer.step", names.STEP)
    def step(
        self, queries: Any, responses: Any, rewards: Any, response_masks: Any = None, *, ref_logps: Any = None
    ) -> dict[str, float]:
        """One PPO step on episodes that were sampled from the policy as it is.

        Args:
            queries, responses: token ids, one tensor (or list) for each episode, of any lengths; strings are encoded. A
                response is what the policy wrote, without its query and without padding behind its end.
            rewards: for each response one number, or one for each of its tokens.
            response_masks: for each response 1 at tokens that the policy wrote and 0 at others (a tool's output, a
                user's turn), which are not scored and which advantages pass over.
            ref_logps: the reference's log-probability of each token, in place of a reference model.

        Returns:
            Statistics under TRL's names; the same on all processes.

        Raises:
            TypeError, ValueError: what cannot be used, by argument and row, before anything has changed.
        """
        rollout = self._rollout(queries, responses, rewards, response_masks, ref_logps)
        self._score(rollout)
        with self.phases("data"):
            advantages.fill(rollout, self.args, self.controller.coef)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.args.schedule(self.global_step, self.total_steps)
        found = stats.of_rollout(
            rollout,
            kl_coef=self.controller.coef,
            kl_in_reward=self.args.kl_in == "reward",
            stop_token_ids=self.stop_token_ids,
        )
        found |= optimise(self, rollout)
        self.controller.update(found.get("objective/kl"), len(rollout))
        self.global_step += 1
        self.episode += len(rollout)
        found |= {"lr": self.optimizer.param_groups[0]["lr"], "episode": float(self.episode)}
        self.last_rollout = rollout
        return found

    def _rollout(self, *given: Any) -> Rollout:
        """Checks the episodes of all processes and puts them together."""
        with self.phases("data"):
            error: Exception | None = None
            mine: list[episodes.Episode] = []
            try:
                mine = episodes.check_step(*given, tokenizer=self.tokenizer, limits=self.limits)
                self._check_reference(given[-1])
            except (TypeError, ValueError) as refused:
                error = refused
            found = self._gathered([(mine, error)])
            for other in (error, *(refused for _, refused in found)):
                if other is not None:
                    raise other
            together = [each for part, _ in found for each in part]
            if len({each.ref_logps is None for each in together}) > 1:
                check.fail("PPOTrainer.step", "ref_logps must be given on all processes or on none")
            return Rollout(together, self.args)

    def _check_reference(self, ref_logps: Any) -> None:
        if self.args.kl_coef and ref_logps is None and self.reference is None and not self.adapter_is_off_in_reference:
            check.fail("PPOTrainer.step", "ref_logps must be given, as reference='given' and kl_coef is not 0")

    @torch.no_grad()
    def _score(self, rollout: Rollout) -> None:
        """Log-probabilities and values under the policy, in one pass, and log-probabilities under the reference."""
        self.model.eval()
        ranks = self.accelerator.num_processes
        parts = -(-len(rollout) // (self.args.local_rollout_forward_batch_size * ranks))
        order = torch.arange(len(rollout)).numpy()
        temperature = self.args.temperature
        mine: list[tuple[Tensor, ...]] = []
        ref_logps = rollout.spread("ref_logps", torch.float64)
        referred = ref_logps is None and (self.reference is not None or self.adapter_is_off_in_reference)
        for share in deal(rollout.lengths, order, parts, self.accelerator.process_index, ranks):
            blank, rows = not len(share), share if len(share) else order[:1]
            batch = rollout.batch(rows, self.pad_token_id, self.device, blank=blank)
            length = int(rollout.lengths[rows].sum())
            with self.phases("score", length):
                scores = self.model(batch, temperature=temperature)
            found = [scores.logps, scores.values]
            if referred:
                with self.phases("reference", length):
                    model, options = self.reference, {}
                    if model is None:
                        model, options = self.model, {"adapter": False}
                    with self.accelerator.autocast():
                        found.append(model(batch, temperature=temperature, values=False, **options).logps)
            if not blank:
                mine.append((rollout.cells(rows), *(each.detach().cpu() for each in found)))
        with self.phases("data"):
            cells, *columns = (torch.cat(column) for column in zip(*self._gathered(mine), strict=True))
            back = cells.argsort()
            rollout.logps, rollout.values = columns[0][back], columns[1][back].to(columns[0].dtype)
            rollout.ref_logps = columns[2][back] if referred else None
            if ref_logps is not None:
                rollout.ref_logps = ref_logps.to(rollout.logps.dtype)

    def _gathered(self, mine: list[Any]) -> list[Any]:
        """The lists of all processes, one after the other."""
        if self.accelerator.num_processes == 1:
            return mine
        found: list[Any] = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(found, mine)
        return [each for part in found for each in part]

    # ---------------------------------------------------------------------------------------- around the algorithm

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Answers names of other trainers: called for what is not there."""
            names.refuse_attribute(WHERE, name)

    def generate(self, queries: Any, *, return_prompt: bool = False, **options: Any) -> list[Tensor]:
        """A sampled response for each query: token ids up to and with the stop token, on the CPU.

        ``options`` are those of ``transformers.GenerationConfig``; by default plain sampling at ``args.temperature`` of
        at most ``args.response_length`` tokens, without top-k, top-p or penalties, which `step` assumes. A response
        ends at any of ``eos_token_id``, an id or several. Strings are encoded with one beginning and no end token.
        """
        rows = tokens.rows_of("PPOTrainer.generate", "queries", queries, self.tokenizer)
        for index, row in enumerate(rows):
            if not len(row):
                check.fail("PPOTrainer.generate", f"queries[{index}] must have at least one token, got none")
        with self.phases("generate"):
            responses = generate.generate(self, rows, **options) if rows else []
        self.phases.tokens["generate"] += sum(len(response) for response in responses)
        if return_prompt:
            return [torch.cat(pair) for pair in zip(tokens.as_tensors(rows), responses, strict=True)]
        return responses

    def train(
        self, dataset: Any, reward_fn: Callable[..., Any], *, resume_from: str | os.PathLike[str] | bool | None = None
    ) -> list[dict[str, float]]:
        """Generates, scores and steps until ``args.total_episodes`` (by default the dataset once).

        Args:
            dataset: prompts: strings, token ids, lists of messages, or rows with one of these as ``prompt``, ``query``
                or ``input_ids`` (a ``datasets.Dataset``).
            reward_fn: ``reward_fn(prompts, responses)`` gives a number for each response (or one per token); further
                arguments that it names are columns of the dataset, or ``response_ids``, the tokens of the responses.
            resume_from: a checkpoint's folder, or True for the newest in ``args.output_dir`` (if there is one): the
                run goes on as if it had not been interrupted, bit for bit.

        Returns:
            The statistics of each step.
        """
        return loop.train(self, self.generate, self.step, dataset, reward_fn, resume_from)

    def evaluate(self, dataset: Any, reward_fn: Callable[..., Any], **options: Any) -> dict[str, float]:
        """Mean score and length of responses to all prompts of a dataset; greedy with ``do_sample=False``, else sampled
        with a seed of its own. Changes nothing: neither the model nor the random state. Each process does all of it.
        """
        return loop.evaluate(self, self.generate, dataset, reward_fn, options)

    def save_checkpoint(self, folder: str | os.PathLike[str] | None = None) -> Path:
        """Everything that `train` needs to go on, into ``folder`` (``output_dir/checkpoint-STEP``), whole or not at
        all."""
        return checkpoint.save(self, None if folder is None else Path(folder))

    def load_checkpoint(self, folder: str | os.PathLike[str]) -> None:
        """The state of `save_checkpoint`: model, optimiser, KL coefficient, random state, position in the data."""
        checkpoint.load(self, Path(folder))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """The policy and the tokenizer for ``from_pretrained``, and the value function beside them
        (``value_model.safetensors``); whole or not at all."""
        checkpoint.save_pretrained(self, Path(folder))
