"""transformers' own tests of its VideoMAE, run on accelerated models.

Their mixins are in the source distribution, not in the wheel: TRANSFORMERS_TESTS names its folder
`tests`, of the installed version. The class below says of VideoMAE what the mixins ask for.
"""

import copy
import importlib
import os
import sys
import types
import unittest
from pathlib import Path
from unittest import mock

import pytest
import torch

import mae_fast

FOLDER = os.environ.get("TRANSFORMERS_TESTS")
if not FOLDER:
    pytest.skip("TRANSFORMERS_TESTS names no folder of its mixins", allow_module_level=True)
transformers = pytest.importorskip("transformers")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
OWN = bool(os.environ.get("TRANSFORMERS_TESTS_OWN"))  # the same tests, of models as they are
DROPOUT = 0.0 if os.environ.get("TRANSFORMERS_TESTS_NO_DROPOUT") else 0.1


class _Absent:
    """Modules of their tests that the source distribution lacks: text generation, exporters."""

    def find_spec(self, name, path=None, target=None):
        if not name.startswith("transformers_tests."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: type(name, (), {}) if name[:2] != "__" else None
        return module

    def exec_module(self, module):
        pass


class _Marks:
    """Their marks are in no configuration here, and say nothing."""

    def __getattr__(self, name):
        if name in ("skip", "skipif", "xfail", "parametrize", "usefixtures"):
            return getattr(MARK, name)
        return lambda *args: args[0] if args and callable(args[0]) else lambda function: function


MARK = pytest.mark


def _mixin():
    package = types.ModuleType("transformers_tests")
    package.__path__ = [FOLDER]
    sys.modules["transformers_tests"] = package
    absent = _Absent()
    sys.meta_path.append(absent)
    try:
        with mock.patch.object(pytest, "mark", _Marks()):
            return importlib.import_module("transformers_tests.test_modeling_common")
    finally:
        sys.meta_path.remove(absent)


common = _mixin()
CLASSES = (
    transformers.VideoMAEModel,
    transformers.VideoMAEForPreTraining,
    transformers.VideoMAEForVideoClassification,
)


def _accelerating(kind):
    """The constructor of `kind`, and the one line after it."""
    init = kind.__init__

    def __init__(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if type(self) is transformers.VideoMAEForPreTraining:
            mae_fast.restore(self.videomae)  # it is a model of its own
        if (type(self) is kind and hasattr(self, "mask_token")) or not hasattr(self, "videomae"):
            mae_fast.accelerate(self)

    return mock.patch.object(kind, "__init__", __init__)


class Tester:
    """One small configuration, and inputs for it."""

    batch_size, image_size, patch_size, num_frames, tubelet_size = 13, 10, 2, 2, 2
    hidden_size, num_hidden_layers, num_attention_heads, num_labels = 32, 2, 4, 10
    seq_length, is_training, num_masks = 25, True, 22

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return transformers.VideoMAEConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_frames=self.num_frames,
            tubelet_size=self.tubelet_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            hidden_dropout_prob=DROPOUT,
            attention_probs_dropout_prob=DROPOUT,
            decoder_hidden_size=self.hidden_size,
            decoder_intermediate_size=37,
            decoder_num_attention_heads=self.num_attention_heads,
            decoder_num_hidden_layers=self.num_hidden_layers,
            attn_implementation="eager",
        )

    def prepare_config_and_inputs_for_common(self):
        size = [self.batch_size, self.num_frames, 3, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": common.floats_tensor(size)}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


class VideoMAETest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = CLASSES
    additional_model_inputs = ("bool_masked_pos",)
    test_resize_embeddings = False
    test_torchscript = False
    test_pruning = False
    test_head_masking = False

    def setUp(self):
        self.model_tester = Tester(self)
        if not OWN:
            for kind in CLASSES:
                patch = _accelerating(kind)
                patch.start()
                self.addCleanup(patch.stop)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs, n = copy.deepcopy(inputs_dict), len(inputs_dict["pixel_values"])
        if model_class is transformers.VideoMAEForPreTraining:
            mask = torch.arange(Tester.seq_length) < Tester.num_masks
            inputs["bool_masked_pos"] = mask.expand(n, -1)
        if return_labels and model_class is transformers.VideoMAEForVideoClassification:
            inputs["labels"] = torch.zeros(n, dtype=torch.long)
        return inputs

    def test_models_are_accelerated(self):
        config = self.model_tester.get_config()
        for kind in CLASSES if not OWN else ():
            model = kind(config)
            forwards = [m for m in model.modules() if "forward" in vars(m)]
            trunk = [model.videomae] if kind is CLASSES[2] else [model]
            assert forwards == trunk

    def test_model_get_set_embeddings(self):
        for kind in CLASSES:
            assert kind(self.model_tester.get_config()).get_input_embeddings() is not None

    @unittest.skip("VideoMAE has no inputs_embeds")
    def test_inputs_embeds(self):
        pass

    def _lengths(self, field, **asked):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for kind in CLASSES:
            masked = kind is transformers.VideoMAEForPreTraining
            tokens = Tester.seq_length - (Tester.num_masks if masked else 0)
            for how in ("argument", "config"):
                config = self.model_tester.get_config()
                kwargs = asked if how == "argument" else {}
                for name in asked if how == "config" else ():
                    setattr(config, name, True)
                model = kind(config).eval()
                with torch.no_grad():
                    out = model(**self._prepare_for_class(inputs, kind), **kwargs)
                yield out[field], tokens

    def test_attention_outputs(self):
        heads = Tester.num_attention_heads
        for attentions, tokens in self._lengths("attentions", output_attentions=True):
            assert [a.shape[1:] for a in attentions] == [(heads, tokens, tokens)] * 2

    def test_hidden_states_output(self):
        for states, tokens in self._lengths("hidden_states", output_hidden_states=True):
            assert [s.shape[1:] for s in states] == [(tokens, Tester.hidden_size)] * 3


assert Path(FOLDER).is_dir(), FOLDER
