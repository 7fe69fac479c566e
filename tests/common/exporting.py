"""The `torch.export` part of the common model tests."""

import copy

import torch


class ExportTesterMixin:
    """Mixed into a model test; wants `all_model_classes`, `model_tester` and `_prepare_for_class`."""

    def test_torch_export(self):
        """The exported program of a forward without cache gives the eager result."""
        if not self.test_torch_exportable:
            self.skipTest("test_torch_exportable is False")
        config, inputs_dict = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__):
                model = model_class(copy.deepcopy(config)).eval()
                inputs = self._prepare_for_class(inputs_dict, model_class) | {"use_cache": False, "return_dict": False}
                with torch.no_grad():
                    eager = model(**inputs)[0]
                    exported = torch.export.export(model, (), inputs, strict=False).module()(**inputs)[0]
                torch.testing.assert_close(exported, eager, rtol=1e-4, atol=1e-5)
