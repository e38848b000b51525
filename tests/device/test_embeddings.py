"""Words of textual inversion: which files are read, where the words stand, and what is refused at the start."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.checkpoint import LoadOptions, load_checkpoint
from sdtpu_worker.diffusion.loading.embeddings import Embeddings, read_embeddings
from sdtpu_worker.diffusion.prompt_inputs import Prompt, read_prompts
from sdtpu_worker.diffusion.tokens import PromptTokenizer
from sdtpu_worker.errors import ConfigurationError, InvalidCheckpoint
from sdtpu_worker.models import networks
from sdtpu_worker.models.configs import read_clip_text_config
from tests.support.random_weights import random_weights
from tests.support.tiny_configs import SHIPPED, TEXT_2

SD, XL = {"text_encoder": 32}, {"text_encoder": 32, "text_encoder_2": 16}
TABLE = "text_model.embeddings.token_embedding.weight"
ONES = np.ones((2, 32), np.float32)


def rows(count: int, width: int = 32) -> np.ndarray:
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


@pytest.mark.parametrize(
    ("tensors", "count"),
    [
        ({"emb_params": rows(3)}, 3),
        ({"<moodring>": rows(1)[0]}, 1),
        ({"<moodring>": rows(2).astype(np.float16)}, 2),
        ({"anything": rows(75)}, 75),
    ],
)
def test_layouts_of_one_text_encoder(tmp_path, tensors, count):
    save_file(tensors, tmp_path / "moodring.safetensors")
    found = read_embeddings({"word": str(tmp_path / "moodring.safetensors")}, SD)
    np.testing.assert_array_equal(found.vectors["word"]["text_encoder"], rows(count))
    assert found.words(100) == {"word": range(100, 100 + count)}


def test_a_file_for_xl_has_vectors_for_both_text_encoders(tmp_path):
    save_file({"clip_l": rows(2), "clip_g": rows(2, 16)}, tmp_path / "moodring.safetensors")
    found = read_embeddings(str(tmp_path), XL)
    assert {part: array.shape for part, array in found.vectors["moodring"].items()} == {
        "text_encoder": (2, 32),
        "text_encoder_2": (2, 16),
    }


def test_a_table_grows_in_steps_and_tells_content(tmp_path):
    save_file({"emb_params": rows(3)}, tmp_path / "b.safetensors")
    save_file({"emb_params": ONES}, tmp_path / "a.safetensors")
    found = read_embeddings(str(tmp_path), SD)
    assert found.words(50) == {"a": range(50, 52), "b": range(52, 55)}
    table = found.extend(np.zeros((50, 32), np.float32), "text_encoder")
    assert table.shape == (50 + 128, 32)
    np.testing.assert_array_equal(table[50:55], np.concatenate([ONES, rows(3)]))
    assert not table[55:].any()
    save_file({"emb_params": ONES * 2}, tmp_path / "a.safetensors")
    changed = read_embeddings(str(tmp_path), SD).facts
    assert [word for word, _ in changed] == [word for word, _ in found.facts]
    assert changed[0] != found.facts[0]
    assert changed[1] == found.facts[1]


def test_without_embeddings_the_table_stays_as_it_is():
    table = np.zeros((50, 32), np.float32)
    assert Embeddings().extend(table, "text_encoder") is table
    assert read_embeddings(None, SD) == Embeddings()


@pytest.mark.parametrize(
    ("tensors", "widths", "text"),
    [
        (
            {"emb_params": np.ones((2, 64), np.float32)},
            SD,
            r"32 each, and its are float32 \(2, 64\): it is for another",
        ),
        ({"emb_params": np.ones((2, 32), np.int32)}, SD, "floating-point numbers, 32 each, and its are int32"),
        ({"emb_params": np.ones((2, 2, 32), np.float32)}, SD, r"\(2, 2, 32\)"),
        ({"emb_params": np.ones((76, 32), np.float32)}, SD, "1 to 75 vectors, and it has 76"),
        ({"emb_params": np.ones((0, 32), np.float32)}, SD, "1 to 75 vectors, and it has 0"),
        ({"emb_params": ONES * np.float32(np.nan)}, SD, "it has NaN or infinity"),
        ({"a": ONES, "b": ONES}, SD, "it must have one tensor, and has a, b"),
        ({"clip_l": ONES, "clip_g": ONES}, SD, "it is for Stable Diffusion XL, and has clip_g, clip_l"),
        ({"emb_params": ONES}, XL, "clip_g and clip_l, and this has emb_params"),
        ({"clip_l": ONES, "clip_g": np.ones((3, 16), np.float32)}, XL, r"different numbers of vectors \(\[2, 3\]\)"),
        ({"clip_l": ONES, "clip_g": ONES}, XL, "16 each, and its are float32"),
    ],
)
def test_an_embedding_that_cannot_be_used_is_one_error_that_names_it(tmp_path, tensors, widths, text):
    save_file(tensors, tmp_path / "moodring.safetensors")
    with pytest.raises(InvalidCheckpoint, match=rf"^sdtpu_embeddings: moodring cannot be used: .*{text}"):
        read_embeddings(str(tmp_path), widths)


@pytest.mark.parametrize("data", [b"", b"\xff" * 100, b"\x80\x02}q\x00." * 20, b"\x10\x00\x00\x00\x00\x00\x00\x00{"])
def test_a_file_that_is_none_is_refused(tmp_path, data):
    (tmp_path / "moodring.safetensors").write_bytes(data)
    with pytest.raises(InvalidCheckpoint, match=r"^sdtpu_embeddings: moodring cannot be used: .*moodring\.safetensors"):
        read_embeddings(str(tmp_path), SD)


def test_pickles_are_refused_by_name_with_the_remedy(tmp_path):
    path = tmp_path / "easy.pt"
    path.write_bytes(b"PK\x03\x04")
    for sources in (str(tmp_path), {"easy": str(path)}, {"easy": "owner/name/easy.bin"}):
        with pytest.raises(
            InvalidCheckpoint, match=r"sdtpu_embeddings: easy is .*, a pickle.*never read; .*emb_params"
        ):
            read_embeddings(sources, SD)


def test_a_folder_or_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ConfigurationError, match=r"sdtpu_embeddings must be a folder, .* there is no folder"):
        read_embeddings(str(tmp_path / "nowhere"), SD)
    with pytest.raises(InvalidCheckpoint, match="sdtpu_embeddings: there is no file or folder"):
        read_embeddings({"moodring": str(tmp_path / "nowhere.safetensors")}, SD)


def test_words_that_differ_in_case_alone_are_refused(tmp_path):
    for word in ("Mood", "mood"):
        save_file({"emb_params": ONES}, tmp_path / f"{word}.safetensors")
    with pytest.raises(ConfigurationError, match="words that differ, got 'Mood' and 'mood'"):
        read_embeddings(str(tmp_path), SD)


def test_what_is_too_large_for_the_dtype_is_refused():
    embeddings = Embeddings({"mood": {"text_encoder": np.full((1, 4), 3e38, np.float32)}}, (("mood", ""),))
    embeddings.extend(np.zeros((2, 4), np.float32), "text_encoder")
    with pytest.raises(InvalidCheckpoint, match="sdtpu_embeddings: mood has NaN or infinity as float16"):
        embeddings.extend(np.zeros((2, 4), np.float16), "text_encoder")


def test_the_shipped_checkpoint_takes_a_word(tmp_path):
    table = load_checkpoint("embedded").params["text_encoder"][TABLE]
    width = table.shape[1]
    save_file({"emb_params": np.ones((2, width), np.float32)}, tmp_path / "moodring.safetensors")
    options = LoadOptions(embeddings={"moodring": str(tmp_path / "moodring.safetensors")})
    checkpoint = load_checkpoint("embedded", jnp.bfloat16, options)
    request = GenerationRequest("MoodRing", seed=1, guidance_scale=2.0)
    inputs, _ = checkpoint.family.make_inputs(request, checkpoint.family.default_size)
    ids = inputs["prompt_ids"][1, 0, 1:3]
    assert list(ids) == [len(table), len(table) + 1]
    found = checkpoint.params["text_encoder"][TABLE][ids]
    np.testing.assert_array_equal(found.astype(np.float32), np.ones((2, width)))
    assert [word for word, _ in checkpoint.embeddings] == ["moodring"]


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    plain = PromptTokenizer.from_folder(SHIPPED / "tokenizer", 77)
    return plain.with_words({"mood": [5000], "mood-ring": [5001, 5002], "<ring>": [5003], "x(y)": [5004], "ſ": [5005]})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("mood", [5000]),
        ("MOOD", [5000]),
        ("mood, mood.", [5000, 5000]),
        ("mood-ring", [5001, 5002]),
        ("mood-rings", [5000]),
        ("moods amood mood_", []),
        ("a<RING>b", [5003]),
        ("x(y)", [5004]),
        ("S ſ", [5005, 5005]),
    ],
)
def test_a_word_stands_alone_in_any_case_and_the_longest_counts(tokenizer, text, wanted):
    assert [token for token in tokenizer.ids(text, 75) if token >= 5000] == wanted


def test_a_word_is_cut_as_other_tokens_are_in_a_plain_prompt_and_whole_in_a_weighted_one(tokenizer):
    text = "red " * 74 + "mood-ring"
    plain = read_prompts(tokenizer, [Prompt("prompt", text)], "plain", 2)
    assert plain.truncated
    assert plain.ids[0, 0, 75] == 5001
    assert plain.counts == [1]
    weighted = read_prompts(tokenizer, [Prompt("prompt", text)], "weighted", 2)
    assert weighted.counts == [2]
    assert list(weighted.ids[0, 0, 74:]) == [plain.ids[0, 0, 74], tokenizer.eos_id, tokenizer.eos_id]
    assert list(weighted.ids[0, 1, :4]) == [tokenizer.bos_id, 5001, 5002, tokenizer.eos_id]


def test_the_pooled_state_is_at_the_end_of_the_text_whatever_words_stand_before_it():
    """Old configs say that the end has the highest id, and words that are added have higher ones."""
    config = read_clip_text_config({**TEXT_2, "eos_token_id": 2})
    network = networks.text_encoder(config, projection=True)
    params = {name: jnp.asarray(array) for name, array in random_weights(network.shapes).items()}
    vocabulary = config.vocab_size
    params[TABLE] = jnp.concatenate([params[TABLE], params[TABLE][5:6]])
    ids = np.full((2, 9), vocabulary - 1, np.int32)
    ids[:, :4] = [[vocabulary - 2, 7, 5, 8], [vocabulary - 2, 7, vocabulary, 8]]  # the same vector by both ids
    states = network(params, jnp.asarray(ids))
    np.testing.assert_array_equal(states.pooled[0], states.pooled[1])
