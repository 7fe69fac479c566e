"""Pushes of the Trainer, `push_to_hub=True` and `trainer.push_to_hub()`: with the code, as those of models."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, trainer
from transformers.dynamic_module_utils import custom_object_save

from .models.rwkv_common import RwkvPreTrainedModel
from .models.tokenization_rwkv import RwkvTokenizer


class PushWithCode(TrainerCallback):
    """Lets the code of our classes go along from when a Trainer is going to push; others keep as they are."""

    def on_init_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        """A Trainer that pushes at every save writes the code into its checkpoints."""
        if args.push_to_hub:
            _register(model, processing_class)

    def on_push_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        """Of a checkpoint it takes no code along, so that is laid into the folder it pushes."""
        _register(model, processing_class)
        if _has_code(model) and state.is_world_process_zero:
            for part in (model, model.config):
                custom_object_save(part, args.output_dir)


def register() -> None:
    """Add the callback to those of every Trainer."""
    if PushWithCode not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(PushWithCode)


def _has_code(model: PreTrainedModel) -> bool:
    # Of a model with adapters, PEFT's or transformers' own, only these are pushed.
    return isinstance(model, RwkvPreTrainedModel) and not getattr(model, "_hf_peft_config_loaded", False)


def _register(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Let these objects, and no others of their classes, be saved with their code."""
    if _has_code(model):
        model._auto_class = model._auto_name
    if isinstance(tokenizer, RwkvTokenizer):
        tokenizer._auto_class = "AutoTokenizer"
