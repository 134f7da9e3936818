"""What other libraries wrap around a model or an optimizer: seen through, or refused in one line.

Classes are recognised by name, so that nothing but torch is imported and nothing is imported early.
"""

import inspect
from collections.abc import Iterator, Sequence
from types import FunctionType
from typing import Any

from torch import nn
from torch.optim import Optimizer

# Class name of the wrapper -> the attribute that holds the wrapped module.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile(model)
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "DeepSpeedEngine": "module",
    "_FabricModule": "module",
}


class AttachError(ValueError):
    """These callbacks cannot be attached to this model and optimizer; the message says what to do."""


def unwrap_model(model: nn.Module) -> nn.Module:
    """The user's own module below `torch.compile`, DDP, FSDP, DeepSpeed and Lightning Fabric."""
    while attribute := next((_WRAPPERS[name] for name in _class_names(model) if name in _WRAPPERS), None):
        model = getattr(model, attribute)
    return model


def in_ddp(model: nn.Module) -> bool:
    """Whether DDP is around it, which goes by the parameters that it found."""
    return any("DistributedDataParallel" in _class_names(module) for module in model.modules())


def unwrap_optimizers(optimizer: object) -> tuple[Optimizer, ...]:
    """The torch optimizers below accelerate's and Lightning's wrappers, each once; None gives none.

    Raises:
        AttachError: for an object whose updates torch's optimizer hooks do not report, or none in a list.
    """
    if optimizer is None:
        return ()
    several = optimizer if isinstance(optimizer, Sequence) else (optimizer,)
    if not several:
        raise AttachError(
            "the list of optimizers is empty: give the model's, or None where the loop calls attached.step()"
        )
    return tuple(dict.fromkeys(_unwrap_optimizer(each) for each in several))


def _unwrap_optimizer(optimizer: object) -> Optimizer:
    # AcceleratedOptimizer is an Optimizer too, but one without hooks: go by the attribute, not the class.
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    # Optimizer.__init__ makes `step` run hooks; a class that does not call it (timm's Lookahead) runs none.
    if isinstance(optimizer, Optimizer) and getattr(type(optimizer).step, "hooked", False):
        return optimizer
    raise AttachError(
        f"{type(optimizer).__name__} does not run torch's optimizer step hooks: pass the torch optimizer "
        "that it wraps, or optimizer=None and call attached.step() after every update that was applied"
    )


def inside_another_step(optimizer: Optimizer) -> bool:
    """Whether the step that runs hooks now was called by a subclass's own, by super().step(), which runs them again.

    Asked within a step hook. torch makes the step of every class that was ever instantiated run hooks.
    """
    kind = type(optimizer)
    if sum(getattr(vars(cls).get("step"), "hooked", False) for cls in kind.__mro__) < 2:
        return False
    code, frame, steps = getattr(kind.step, "__code__", None), inspect.currentframe(), 0
    while frame is not None:
        steps += frame.f_code is code and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps > 1


def obstacles(model: nn.Module) -> Iterator[tuple[str, str]]:
    """What about this model keeps hooks from working: pairs of a name in `Callback.supports` and a line."""
    if any("DeepSpeedEngine" in _class_names(module) for module in model.modules()):
        yield "deepspeed", "a DeepSpeed engine runs neither gradient hooks nor optimizer hooks"
    if any("FullyShardedDataParallel" in _class_names(module) for module in model.modules()) or any(
        "DTensor" in _class_names(parameter) for parameter in model.parameters()
    ):
        yield (
            "sharded",
            "its parameters are sharded (FSDP, DTensor), so hooks on them never fire: use DDP",
        )
    if _was_called_compiled(model):
        yield (
            "compiled",
            "torch.compile has already compiled it (or another model of its class) and ignores new hooks: "
            "attach before the first call, or call torch.compiler.reset() first",
        )


def _was_called_compiled(model: nn.Module) -> bool:
    """True where torch.compile holds compiled code for this model, or code that this model would run.

    Such code is found by class and is not guarded on hooks: a model that was never called runs the code of
    another one of its class, without its own hooks. So compiled code of any of the model's classes counts.
    """
    compiled = [
        module
        for module in model.modules()
        if "OptimizedModule" in _class_names(module) or module._compiled_call_impl is not None
    ]
    return any(_has_code(module) for module in compiled)


def _has_code(compiled: nn.Module) -> bool:
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list, innermost_fn

    region = unwrap_model(compiled)
    for module in region.modules():
        # torch's own layers are inlined into the code of the module around them.
        if not type(module).__module__.startswith("torch.nn.") and _debug_get_cache_entry_list(
            inspect.unwrap(type(module).forward).__code__
        ):
            return True
    context = getattr(compiled, "dynamo_ctx", None)
    if context is None:  # module.compile(), in place
        return False
    # These functions, accelerate's around `forward` and torch's around its own layers, serve all models:
    # their compiled code is this model's if its backend is.
    shared = (innermost_fn(compiled.forward), getattr(region.forward, "__func__", None))
    codes = [function.__code__ for function in shared if isinstance(function, FunctionType)]
    entries = [entry for code in codes for entry in _debug_get_cache_entry_list(code)]
    return any(entry.backend is _innermost(context.callback) for entry in entries)


def _innermost(backend: Any) -> Any:
    """The backend itself, below what torch.compile wraps it in."""
    for name in ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable"):
        while hasattr(backend, name):
            backend = getattr(backend, name)
    return backend


def _class_names(thing: object) -> list[str]:
    return [cls.__name__ for cls in type(thing).__mro__]
