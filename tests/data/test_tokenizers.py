"""Loading a tokenizer by its folder or by what ships."""

import pytest

from halos_pl.data.tokenizers import load_tokenizer, opening_and_continuation


def test_load_tokenizer_names_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=f"no tokenizer could be loaded from '{tmp_path}'"):
        load_tokenizer(str(tmp_path))


def test_a_bare_config_brings_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_what_ships_is_found_by_its_name():
    assert load_tokenizer("nano:model").eos_token == "</s>"
    with pytest.raises(ValueError, match="did you mean nano:model"):
        load_tokenizer("nano:modl")


def test_a_byte_level_tokenizer_has_one_form():
    backend = load_tokenizer("nano:model").backend_tokenizer
    opening, continuation = opening_and_continuation(backend)
    assert opening is continuation
    assert opening is not backend, "a private copy"
