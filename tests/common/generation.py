"""The `generate` part of the common model tests: every decoding method against a plain loop over the model."""

import copy

import torch
from conftest import stir
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

NEW = 6


class GenerationTesterMixin:
    """Mixed into a model test; wants `all_generative_model_classes` and `model_tester`."""

    def generative_models(self, **config_changes):
        """Every generative class with (model in eval mode, prompt ids (B, T) of real tokens)."""
        for model_class in self.all_generative_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            for name, value in config_changes.items():
                setattr(config, name, value)
            model = stir(model_class(config).eval())
            model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
            with self.subTest(model_class.__name__), torch.no_grad():
                yield model, inputs["input_ids"][:2]

    def greedy_loop(self, model, ids: torch.Tensor, steps: int = NEW) -> torch.Tensor:
        """Greedy decoding without cache: the whole text again at every step."""
        for _ in range(steps):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        return ids

    def greedy(self, model, ids=None, **kwargs):
        return model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **kwargs)

    def test_greedy_generate(self):
        for model, ids in self.generative_models():
            self.assertEqual(self.greedy(model, ids).tolist(), self.greedy_loop(model, ids).tolist())

    def test_greedy_generate_without_cache(self):
        for model, ids in self.generative_models():
            self.assertEqual(self.greedy(model, ids, use_cache=False).tolist(), self.greedy(model, ids).tolist())

    def test_greedy_generate_dict_outputs(self):
        for model, ids in self.generative_models():
            out = self.greedy(
                model,
                ids,
                return_dict_in_generate=True,
                output_scores=True,
                output_logits=True,
                output_hidden_states=True,
            )
            self.assertEqual(out.sequences.shape, (2, ids.shape[1] + NEW))
            self.assertEqual((len(out.scores), len(out.logits), len(out.hidden_states)), (NEW, NEW, NEW))
            whole = model(out.sequences[:, :-1], use_cache=False).logits
            torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, -NEW:], rtol=0, atol=1e-4)
            self.check_cache(out.past_key_values, model.config, batch=2, seen=out.sequences.shape[1] - 1)

    def check_cache(self, cache, config, batch: int, seen: int):
        """The returned cache counts its tokens and holds one entry for every row in every layer."""
        self.assertEqual(int(cache.get_seq_length()), seen)
        self.assertEqual(len(cache.layers), config.num_hidden_layers)
        for layer in cache.layers:
            for state in (layer.conv_states[0], layer.conv_states[1], layer.recurrent_states[0]):
                self.assertEqual(state.shape[0], batch)
                self.assertTrue(torch.isfinite(state).all())

    def test_beam_search_generate(self):
        for model, ids in self.generative_models():
            out = self.greedy(
                model, ids, num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True
            )
            uncached = self.greedy(model, ids, num_beams=3, num_return_sequences=3, use_cache=False)
            self.assertEqual(out.sequences.tolist(), uncached.tolist())
            # A beam's score is the mean log-probability of its new tokens under the model itself.
            log_p = model(out.sequences, use_cache=False).logits[:, ids.shape[1] - 1 : -1].log_softmax(-1)
            chosen = log_p.gather(-1, out.sequences[:, ids.shape[1] :, None]).squeeze(-1)
            torch.testing.assert_close(out.sequences_scores, chosen.sum(-1) / NEW, rtol=0, atol=1e-4)

    def test_generate_from_inputs_embeds(self):
        for model, ids in self.generative_models():
            embeds = model.get_input_embeddings()(ids)
            self.assertEqual(
                self.greedy(model, inputs_embeds=embeds).tolist(), self.greedy(model, ids)[:, ids.shape[1] :].tolist()
            )

    def test_generate_continue_from_past_key_values(self):
        for model, ids in self.generative_models():
            whole = self.greedy(model, ids)
            cache = model(ids[:, :3], use_cache=True).past_key_values
            self.assertEqual(self.greedy(model, ids, past_key_values=cache).tolist(), whole.tolist())

    def test_generate_with_static_cache(self):
        for model, ids in self.generative_models():
            out = self.greedy(
                model, ids, cache_implementation="static", return_dict_in_generate=True, disable_compile=True
            )
            self.assertEqual(out.sequences.tolist(), self.greedy(model, ids).tolist())

    def test_left_padding_compatibility(self):
        for model, ids in self.generative_models():
            padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids], 1)
            mask = torch.cat([torch.zeros(2, 4, dtype=torch.long), torch.ones_like(ids)], 1)
            alone = model(ids, use_cache=False).logits[:, -1]
            for positions in (None, (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)):
                logits = model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
                torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)

    def test_right_padding_compatibility(self):
        for model, ids in self.generative_models():
            T = ids.shape[1]
            padded = torch.cat([ids, torch.zeros(2, 4, dtype=torch.long)], 1)
            mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 4, dtype=torch.long)], 1)
            alone = model(ids, use_cache=True)
            out = model(padded, attention_mask=mask, use_cache=True)
            torch.testing.assert_close(out.logits[:, :T], alone.logits, rtol=0, atol=1e-5)
            # The padding has left no trace: the next token follows the text.
            after = [model(ids[:, :1], past_key_values=o.past_key_values).logits for o in (out, alone)]
            torch.testing.assert_close(*after, rtol=0, atol=1e-5)

    def test_assisted_decoding_is_refused(self):
        for model, ids in self.generative_models():
            with self.assertRaisesRegex(ValueError, "stateful"):
                self.greedy(model, ids[:1], assistant_model=copy.deepcopy(model))

    def test_cache_from_config(self):
        for model, ids in self.generative_models():
            cache = DynamicCache(config=model.config)
            out = model(ids, past_key_values=cache, use_cache=True)
            self.assertIs(out.past_key_values, cache)
            self.check_cache(cache, model.config, batch=2, seen=ids.shape[1])
