from qvtune.convert.sources.names import model_names, plain_keys

Q = "model.layers.0.self_attn.q_proj"


def test_wrappers_and_adapter_names_are_taken_off() -> None:
    wrapped = {
        f"base_model.model.{Q}.lora_A.mine.weight": 1,
        f"module.base_model.model.{Q}.lora_B.mine.weight": 2,
        f"{Q}.lora_magnitude_vector.mine.weight": 3,
        f"base_model.model.{Q}.base_layer.bias": 4,
        "base_model.model.score.modules_to_save.mine.weight": 5,
        "base_model.model.score.original_module.weight": 6,
        "base_model.model.model.embed_tokens.lora_embedding_A.mine": 7,
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.mine": 8,
        "base_model.model.classifier.modules_to_save.mine.out_proj.weight": 9,
    }
    assert plain_keys(wrapped) == {
        f"{Q}.lora_A.weight": 1,
        f"{Q}.lora_B.weight": 2,
        f"{Q}.lora_magnitude_vector": 3,
        f"{Q}.bias": 4,
        "score.weight": 5,
        "model.embed_tokens.lora_embedding_A": 7,
        "model.embed_tokens.token_adapter.trainable_tokens_delta": 8,
        "classifier.out_proj.weight": 9,
    }


def test_a_module_that_is_called_as_an_adapter_is_by_default_stays() -> None:
    keys = {"base_model.model.default.q.lora_A.weight": 1, "base_model.model.default.q.lora_B.weight": 2}
    assert list(plain_keys(keys)) == ["default.q.lora_A.weight", "default.q.lora_B.weight"]


def test_prefixes_that_one_side_has_and_the_other_has_not() -> None:
    same = model_names(["h.0.w"], ["h.0.w", "ln.w"])
    assert same == {"h.0.w": "h.0.w", "ln.w": "ln.w"}
    bare_file = model_names(["transformer.h.0.w", "score.weight"], ["h.0.w", "ln.w", "lm_head.weight"])
    assert bare_file == {"transformer.h.0.w": "h.0.w", "transformer.ln.w": "ln.w", "lm_head.weight": "lm_head.weight"}
    bare_model = model_names(["encoder.0.w"], ["bert.encoder.0.w", "cls.bias"])
    assert bare_model == {"encoder.0.w": "bert.encoder.0.w", "cls.bias": "cls.bias"}


def test_norms_of_the_oldest_checkpoints() -> None:
    found = model_names([], ["a.LayerNorm.gamma", "a.LayerNorm.beta", "b.gamma"])
    assert found == {
        "a.LayerNorm.weight": "a.LayerNorm.gamma",
        "a.LayerNorm.bias": "a.LayerNorm.beta",
        "b.gamma": "b.gamma",
    }
