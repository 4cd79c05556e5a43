"""Names that TRL has, or had, for what is asked for: answered in a sentence with the name here."""

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import NoReturn, ParamSpec, TypeVar

from prefkern import check

P = ParamSpec("P")
R = TypeVar("R")

OPTIONS = {
    # TRL before 0.12
    "ppo_epochs": "use num_ppo_epochs",
    "lr": "use learning_rate",
    "init_kl_coef": "use kl_coef",
    "adap_kl_ctrl": "use kl_controller='adaptive' for True, 'fixed' for False",
    "target": "use kl_target",
    "horizon": "use kl_horizon",
    "kl_penalty": "use kl_estimator, 'k1' for 'kl' and 'k2' for 'mse'",
    "early_stopping": "use target_kl, which stops a step early, and None for False",
    "steps": "use total_episodes, which counts episodes",
    "forward_batch_size": "use local_rollout_forward_batch_size",
    "backward_batch_size": "use per_device_train_batch_size",
    "log_with": "use report_to",
    "project_kwargs": "use output_dir",
    "accelerator_kwargs": "pass accelerator=Accelerator(...) to PPOTrainer",
    "tracker_kwargs": "call trainer.accelerator.init_trackers(...) in a loop of your own",
    "tracker_project_name": "call trainer.accelerator.init_trackers(...) in a loop of your own",
    "use_score_scaling": "use whiten_rewards, or scale in the reward function",
    "use_score_norm": "use whiten_rewards, or scale in the reward function",
    "score_clip": "clip in the reward function",
    "ratio_threshold": "use dual_clip or target_kl",
    "model_name": "pass the model to PPOTrainer",
    "is_encoder_decoder": "leave it out: models are causal",
    "is_peft_model": "leave it out: a peft model is recognised",
    "optimize_cuda_cache": "leave it out",
    "optimize_device_cache": "leave it out",
    "compare_steps": "leave it out",
    # TRL since 0.12, and transformers
    "exp_name": "use output_dir",
    "run_name": "use output_dir",
    "logging_dir": "use output_dir",
    "sft_model_path": "pass the model to PPOTrainer",
    "reward_model_path": "pass a reward function to PPOTrainer.train",
    "model_adapter_name": "set the model's active adapter before it is passed to PPOTrainer",
    "ref_adapter_name": "pass ref_model to PPOTrainer; the reference of a peft model is it without its adapter",
    "num_train_epochs": "use total_episodes",
    "max_steps": "use total_episodes, batch_size times as many",
    "num_sample_generations": "call PPOTrainer.evaluate",
    "world_size": "leave it out: accelerate knows it",
    "ds3_gather_for_generation": "leave it out",
    "bf16": "use mixed_precision='bf16'",
    "fp16": "use mixed_precision='fp16'",
    "optim": "pass optimizer to PPOTrainer",
    "warmup_ratio": "use warmup_steps",
    "max_new_tokens": "use response_length",
    "max_completion_length": "use response_length",
    "per_device_eval_batch_size": "use local_rollout_forward_batch_size",
}
TRAINER = {
    "config": "use args",
    "processing_class": "use tokenizer",
    "policy": "use model",
    "ref_policy": "use ref_model",
    "reward_model": "pass a reward function to PPOTrainer.train",
    "reward_funcs": "pass a reward function to PPOTrainer.train",
    "dataset": "pass it to PPOTrainer.train",
    "train_dataset": "pass it to PPOTrainer.train",
    "eval_dataset": "pass it to PPOTrainer.evaluate",
    "data_collator": "leave it out: rows are of any length",
    "optimizers": "use optimizer; lr_scheduler_type is an option of PPOConfig",
    "lr_scheduler": "use lr_scheduler_type of PPOConfig",
    "callbacks": "call generate and step in a loop of your own",
    "peft_config": "pass peft.get_peft_model(model, peft_config) as model",
    "num_shared_layers": "leave it out",
}
STEP = {"scores": "use rewards", "query_tensors": "use queries", "response_tensors": "use responses"}
GENERATE = {
    "query_tensor": "use queries",
    "batch_size": "use local_rollout_forward_batch_size of PPOConfig",
    "length_sampler": "use max_new_tokens",
    "generate_ref_response": "call trainer.reference.generate",
    "generation_config": "pass its options by name, as generate(queries, top_p=0.9)",
    "num_return_sequences": "give each query as often as it is to be answered",
}
ATTRIBUTES = {
    "log_stats": "PPOTrainer.step returns the statistics, and PPOTrainer.train sends them to report_to; in a loop of "
    "your own call trainer.accelerator.init_trackers('ppo'), then trainer.accelerator.log(stats, trainer.global_step)",
    "config": "use args",
    "processing_class": "use tokenizer",
    "ref_model": "use reference.policy",
    "kl_ctl": "use controller",
    "current_device": "use device",
    "dataloader": "PPOTrainer.train takes a dataset; in a loop of your own make a torch.utils.data.DataLoader",
    "save_model": "use save_pretrained",
    "push_to_hub": "call save_pretrained(folder), then push the folder",
    "generate_completions": "call generate, or evaluate",
}


def refuse_unknown(where: str, given: Collection[str], known: Collection[str], elsewhere: Mapping[str, str]) -> None:
    """Raises TypeError for names that are not known, each with what to use in its place."""
    unknown = [name for name in given if name not in known]
    if unknown:
        check.fail_type(where, "; ".join(_missing(name, known, elsewhere) for name in unknown))


def _missing(name: str, known: Collection[str], elsewhere: Mapping[str, str]) -> str:
    if name in elsewhere:
        return f"there is no {name}: {elsewhere[name]}"
    near = difflib.get_close_matches(name, [each for each in known if each != "self"], n=1)
    return f"there is no {name}" + (f": did you mean {near[0]}?" if near else "")


def answered(where: str, elsewhere: Mapping[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a method: wrong names, and more arguments than have a place, are refused in a sentence."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters.values()
        known = [each.name for each in parameters]
        placed = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
        named = not any(each.kind is each.VAR_KEYWORD for each in parameters)

        @functools.wraps(function)
        def call(*given: P.args, **options: P.kwargs) -> R:
            if named:
                refuse_unknown(where, options, known, elsewhere)
            if len(given) > len(placed):
                order = f"are {', '.join(placed[1:])}" if placed[1:] else "do not exist"
                check.fail_type(where, f"arguments without a name {order}; all others have one: got {len(given) - 1}")
            return function(*given, **options)

        return call

    return decorate


def refuse_attribute(where: str, name: str) -> NoReturn:
    """Raises AttributeError, with what to use in its place where that is known."""
    raise AttributeError(f"prefkern.{where}: {_missing(name, (), ATTRIBUTES)}")
