"""What a model does around its output matrix, found by running its own forward with the trunk and the matrix replaced.

The trunk is replaced by given hidden states t and the matrix by given numbers y, so that no layer runs and no weight is
read: what arrives at the matrix, ``x = t / m``, and what becomes of y, ``z = c tanh(s y / c)``, show the constants m, s
and c to float64's precision, under whatever names the configuration has them, and whether they are applied at all.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_MAGNITUDES = (0.0, 1e-4, 1.0, 10.0, 100.0, 1e4, 1e6)  # of y, one for each position
_SMALL, _LARGE, _HUGE = 1, 5, 6
_MASKED = -1e3  # a logit of a zero below this one is a token that cannot be sampled


class Form(NamedTuple):
    """``z = softcap(logit_scale (h W^T + bias / divisor))`` over the first ``vocabulary`` rows of W."""

    logit_scale: float
    softcap: float | None
    divisor: float
    """The hidden states are divided by it before the matrix; contained in ``logit_scale``."""
    vocabulary: int
    allowed: Tensor | None
    """``[V]`` bool: the tokens whose logits are not masked."""
    trunk: str | None
    """The submodule whose output h enters the matrix, but for the divisor; None where more than that lies between."""


class NotThisForm(Exception):  # noqa: N818 - caught and told in a sentence, never raised to the user
    """The model's logits are not of the form; the text is the part of a sentence that says what was seen."""


def probe(model: Any, layer: nn.Module, V: int, H: int) -> Form:
    """Runs the model's forward around stand-ins for trunk and matrix. Raises `NotThisForm`."""
    last: Exception | None = None
    own, device = _kind(model)
    ids = torch.zeros(1, len(_MAGNITUDES), dtype=torch.long, device=device)
    for dtype in (torch.float64, None):  # float64 cannot pass a transform with weights: then its own dtype
        trunk = _Trunk(H, dtype or own, device)
        matrix = _Matrix(layer, V, device)
        names = trunk_names(model)
        try:
            with _replaced(model, {layer: matrix}, trunk, names):
                output = type(model).forward(model, input_ids=ids)
        except Exception as error:  # whatever a model's code raises on stand-ins
            last = error
            continue
        if matrix.x is not None and trunk.called is not None:
            return _form(model, trunk, matrix, _logits(output))
        last = None
    why = (
        f"its forward fails on stand-ins for trunk and matrix ({type(last).__name__}: {str(last)[:200]})"
        if last
        else (
            "its forward does not call the trunk and the output layer that it names (base_model, get_output_embeddings)"
        )
    )
    raise NotThisForm(why)


def trunk_names(model: Any) -> list[str]:
    """Submodules that may be the trunk, the outermost first."""
    found: list[Any] = []
    owners = [model, getattr(model, "base_model", None), getattr(model, "model", None)]
    found += owners[1:]
    for owner in owners:
        with contextlib.suppress(Exception):  # a model without one raises what it likes
            found.append(owner.get_decoder())
        found += [getattr(owner, name, None) for name in ("decoder", "language_model", "text_model")]
    wanted = {id(module) for module in found if isinstance(module, nn.Module)}
    return [name for name, module in model.named_modules() if name and id(module) in wanted]


class _Trunk:
    """Hidden states, and which of the candidates was asked for them."""

    def __init__(self, H: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(1, len(_MAGNITUDES), H, dtype=torch.float64, generator=generator).to(device, dtype)
        self.called: str | None = None


class _StandIn(nn.Module):
    """Called in place of a submodule; its attributes are those of the submodule."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["_original"] = original  # not as a child: modules would be found twice

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_original"], name)


class _TrunkStandIn(_StandIn):
    def __init__(self, original: nn.Module, name: str, trunk: _Trunk) -> None:
        super().__init__(original)
        self.__dict__.update(_trunk=trunk, _name=name)

    def forward(self, *args: Any, **options: Any) -> Any:
        trunk: _Trunk = self.__dict__["_trunk"]
        trunk.called = self.__dict__["_name"]
        return _Output(trunk.hidden)


class _Matrix(_StandIn):
    def __init__(self, original: nn.Module, V: int, device: torch.device) -> None:
        super().__init__(original)
        ramp = torch.linspace(-1.0, 1.0, V, dtype=torch.float64)  # each column its own number
        y = torch.tensor(_MAGNITUDES, dtype=torch.float64)[None, :, None] * ramp
        self.__dict__.update(x=None, y=y.to(device))

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        self.__dict__["x"] = x
        y: Tensor = self.__dict__["y"]
        return y.clone()


class _Output:
    """What a trunk returns, read as a tuple, a mapping or an object; everything but the hidden states is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return getattr(self, key)
        return (self.last_hidden_state,)[key] if isinstance(key, slice) or key == 0 else None

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.last_hidden_state,))

    def __len__(self) -> int:
        return 1


@contextlib.contextmanager
def _replaced(model: Any, others: dict[nn.Module, nn.Module], trunk: _Trunk, names: list[str]) -> Iterator[None]:
    """Children of their parents for a while: the originals and their hooks are not touched."""
    stand_ins = {
        **{model.get_submodule(name): _TrunkStandIn(model.get_submodule(name), name, trunk) for name in names},
        **others,
    }
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child in stand_ins
    ]
    for parent, name, child in places:
        parent._modules[name] = stand_ins[child]
    try:
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def _form(model: Any, trunk: _Trunk, matrix: _Matrix, z: Any) -> Form:
    x, y = matrix.__dict__["x"], matrix.__dict__["y"]
    if not isinstance(z, Tensor) or z.ndim != 3 or z.shape[:2] != y.shape[:2] or z.shape[2] > y.shape[2]:
        raise NotThisForm(f"of {tuple(y.shape)} products it makes logits of {getattr(z, 'shape', type(z).__name__)}")
    close = 8 * max(torch.finfo(z.dtype).eps, 1e-9)
    y, z, constants = y[0, :, : z.shape[2]], z[0].double(), _constants(model)
    allowed = z[0] > _MASKED
    if bool(allowed.any()) and float(z[0][allowed].abs().max()) > close:
        raise NotThisForm("something is added to the products behind the matrix")
    y, z = y[:, allowed], z[:, allowed]
    largest = z.abs().amax(1)
    capped = float(largest[_HUGE]) < 2 * float(largest[_LARGE])
    cap = _named(float(largest[_HUGE]), constants, close) if capped else None
    scale = _named(float((z[_SMALL] * y[_SMALL]).sum() / y[_SMALL].square().sum()), constants, close)
    expected = scale * y if cap is None else cap * torch.tanh(scale * y / cap)
    apart = ((z - expected).abs().amax(1) / expected.abs().amax(1).clamp(min=1e-30))[1:].max()
    if not float(apart) <= 16 * close:
        raise NotThisForm(
            f"what becomes of the products is not a scale and a tanh cap (nearest: scale {scale:g}, cap {cap}, "
            f"relative difference {float(apart):.2g})"
        )
    name, divisor = _before(trunk, x, constants)
    return Form(
        scale / divisor,
        cap,
        divisor,
        z.shape[1] if bool(allowed.all()) else len(allowed),
        None if bool(allowed.all()) else allowed,
        name,
    )


def _before(trunk: _Trunk, x: Tensor, constants: list[float]) -> tuple[str | None, float]:
    """The trunk's name and the divisor, if nothing but a division lies between it and the matrix."""
    t = trunk.hidden.double()
    if x.shape != t.shape:
        return None, 1.0
    close = 4 * max(torch.finfo(x.dtype).eps, torch.finfo(trunk.hidden.dtype).eps)
    factor = float((x.double() * t).sum() / t.square().sum())
    if not factor > 0 or not torch.allclose(x.double(), factor * t, rtol=close, atol=close * float(t.abs().max())):
        return None, 1.0
    return trunk.called, _named(1 / factor, constants, close)


def _named(value: float, constants: list[float], close: float) -> float:
    """The constant of the model that was measured, to its last digit; the measured value if it has no such constant."""
    nearest = min((1.0, *constants), key=lambda each: abs(each - value))
    return nearest if abs(nearest - value) <= 16 * close * abs(value) else value


def numbers(model: Any) -> dict[str, float]:
    """The numbers that its configuration, the model and its trunk hold."""
    owners = [model.config, model, getattr(model, "base_model", None)]
    with contextlib.suppress(Exception):
        owners.append(model.config.get_text_config())
    return {
        f"{place}.{name}": float(value)
        for place, owner in enumerate(owners)
        for name, value in vars(owner).items()
        if isinstance(value, float | int) and not isinstance(value, bool)
    }


def _constants(model: Any) -> list[float]:
    held = [value for value in numbers(model).values() if value and abs(value) < 1e30]
    return held + [1 / value for value in held]


def _kind(model: Any) -> tuple[torch.dtype, torch.device]:
    """Its dtype and device; the CPU for a model on meta, where nothing can be seen."""
    weight = next((each for each in model.parameters() if each.is_floating_point()), torch.zeros(()))
    return weight.dtype, torch.device("cpu") if weight.is_meta else weight.device


def _logits(output: Any) -> Any:
    return getattr(output, "logits", None) if hasattr(output, "logits") else output[0]
