"""A snapshot of a model is another after one change of any kind, and the same without."""

import pytest
from torch import Tensor, nn

from mae_fast.guard import Snapshot


def _act(x: Tensor) -> Tensor:
    return nn.functional.relu(x)


class Inner(nn.Module):
    """A block of a model's own code, with a dropout that it asks for `training`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop, self.norm = nn.Linear(3, 3), nn.Dropout(0.1), nn.LayerNorm(3)
        self.scale, self.sizes = 2.0, [1, 2]
        self.register_buffer("table", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.drop(_act(self.fc(x)) * self.scale))

    def part(self, x: Tensor) -> Tensor:
        return x


class Model(nn.Module):
    """What is accelerated: its own attributes are compared by name."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.token, self.ratio = Inner(), nn.Parameter(Tensor(1, 1, 3)), 0.9

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.token


def _module_of(model: nn.Module) -> dict:
    return Inner.forward.__globals__


CHANGES = {
    "a method of a class": lambda m, patch: patch.setattr(Inner, "part", lambda self, x: 2 * x),
    "a class's own attribute": lambda m, patch: patch.setattr(Inner, "bias", 1, raising=False),
    "a function that code names": lambda m, patch: patch.setitem(_module_of(m), "_act", Inner),
    "an attribute of the model": lambda m, patch: setattr(m, "ratio", 0.5),
    "a new one of the model": lambda m, patch: setattr(m, "more", 1),
    "an attribute inside": lambda m, patch: setattr(m.block, "scale", 1.0),
    "a new one inside": lambda m, patch: setattr(m.block, "more", 1),
    "what is in a list": lambda m, patch: m.block.sizes.append(3),
    "the class of a module": lambda m, patch: setattr(m.block, "__class__", Model),
    "another module": lambda m, patch: setattr(m.block, "fc", nn.Linear(3, 3)),
    "a parameter's name": lambda m, patch: m.block.fc._parameters.update(
        shift=m.block.fc._parameters.pop("bias")
    ),
    "a parameter that is there no more": lambda m, patch: setattr(m.block.fc, "bias", None),
    "a buffer that is there now": lambda m, patch: setattr(m.block, "table", Tensor(3)),
    "the kind of a parameter": lambda m, patch: m.block.fc._parameters.update(weight=Tensor(3, 3)),
    "the shape of a token": lambda m, patch: setattr(m, "token", nn.Parameter(Tensor(1, 2, 3))),
    "a layer's p": lambda m, patch: setattr(m.block.drop, "p", 0.2),
    "a layer's eps": lambda m, patch: setattr(m.block.norm, "eps", 1e-3),
    "training, of a dropout alone": lambda m, patch: m.block.drop.eval(),
    "training, of a block alone": lambda m, patch: setattr(m.block, "training", False),
    "a hook": lambda m, patch: m.block.register_forward_hook(lambda *args: None),
    "a hook before": lambda m, patch: m.block.fc.register_forward_pre_hook(lambda *args: None),
    "a hook of all": lambda m, patch: patch.setitem(
        nn.modules.module._global_forward_hooks, 0, lambda *args: None
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_change_is_seen(change, monkeypatch):
    model = Model()
    snapshot = Snapshot(model)
    assert snapshot.same() and snapshot.same()
    CHANGES[change](model, monkeypatch)
    assert not snapshot.same()
    assert Snapshot(model).same()


def test_values_of_parameters_are_none_of_its_business():
    model = Model()
    snapshot = Snapshot(model, written=("ratio",))
    for p in model.parameters():
        p.data.mul_(2)
    model.ratio = 0.5  # written by the forward itself
    assert snapshot.same()
