"""One non-default value for each argument that every transformers configuration takes."""

config_common_kwargs = {
    "architectures": ["SomeModel"],
    "chunk_size_feed_forward": 5,
    "dtype": "float16",
    "id2label": {0: "label"},
    "is_encoder_decoder": True,
    "label2id": {"label": "0"},
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}
