"""Videos probed and encoded in the tests' own process: processes that import torch take most of the
time. Those that are started are the killed pack's, and test_index.py's."""

import contextlib
import importlib
import json

import pytest

from mae_fast.data.container import BadVideo


def answers(tasks, function, workers, timeout):
    module, name = function.split(":")
    function = getattr(importlib.import_module(module), name)
    for key, arguments in tasks:
        try:
            facts = function(*arguments)
        except BadVideo as e:
            facts = {"error": e.reason}
        yield key, json.loads(json.dumps(facts))


@contextlib.contextmanager
def in_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mae_fast.data.pack.answers", answers)
        patch.setattr("mae_fast.data.index.answers", answers)
        yield
