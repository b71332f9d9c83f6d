"""Wan's prompts against diffusers' cleaning and transformers' generic fast tokenizer."""

import json
import random

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from vpo_jax.families.wan.prompts import FILES, WanTokenizer, clean_prompt, token_mask
from vpo_jax.recipes.tokenizer import make_umt5_tokenizer
from vpo_jax.runtime.errors import UserError

SPECIALS = ["<pad>", "</s>", "<s>", "<unk>"]
NASTY = [
    "",
    "   ",
    "a cat",
    "  A  Cat\t\tand\n\n a dog \r\n",
    "schÃ¶n, dÃ©jÃ vu, itâ€™s a â€œtestâ€",
    "l&#39;&eacute;t&eacute; &amp;amp;lt;b&amp;amp;gt; &amp;nbsp; &lt;i&gt; &copy &notanentity;",
    "<b> &amp;amp;lt;i&amp;gt; &#28;a&#x0b;b&#0;c&#x110000;d&#128512;",
    "no\u00a0break\u2003em\u3000ideographic\u200bzero\u200dwidth\ufeffbom\u0085nel\u2028line\u2029paragraph",
    "\x1c\x1d\x1e\x1f\x00\x07\x7f controls \x1b[31mred\x1b[0m",
    "\u4e00\u53ea\u732b\u3000\u5728\u96ea\u5730\u91cc\uff0c\uff21\uff22\uff23\uff01",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "e\u0301 vs \u00e9, \ufb01 ligature, \u2460 \u00bd \u212b",
    "\U0001f431 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "“curly” ‘quotes’ – dashes — and … ellipsis",
    "<script>alert('x')</script><b>&amp; [bold]",
    "lone surrogate \ud83d and a pair \ud83d\ude00",
    "</s> in <pad> the <s> middle <unk> </s>",
    "a very " * 600 + "small circle",
    "x" * 3000,
]


def umt5_file(processed=True, layout=SPECIALS, words=("a", "very", "small", "cat", "circle", "\u4e00", "\u732b")):
    """A tokenizer.json in umT5's layout: Unigram with bytes for unknown characters; NFKC stands for its charsmap."""
    scores = [(token, 0.0) for token in layout] + [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    scores += [("\u2581", -3.0)] + [(c, -9.0) for c in "abcdefghij.,&<>/s"] + [(f"\u2581{w}", -4.0) for w in words]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=3, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="\u2581")
    if processed:
        tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    tokenizer.add_special_tokens(list(layout))
    return tokenizer


@pytest.fixture
def folder(tmp_path):
    """A folder with the files of a published tokenizer, and padding and truncation left on in it."""
    tokenizer = umt5_file()
    tokenizer.enable_padding(length=7)
    tokenizer.enable_truncation(5)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5TokenizerFast",  "extra_ids": 300}\n')
    (tmp_path / "special_tokens_map.json").write_text("{ }")
    (tmp_path / "spiece.model").write_bytes(bytes(range(256)))
    return tmp_path


@pytest.mark.slow  # its pipelines take ten seconds to import
def test_prompts_are_cleaned_as_in_diffusers():
    pipeline_wan = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan")
    rng = random.Random(0)
    alphabet = "".join(NASTY) + "&;#x \t\n\u00a0"
    drawn = ["".join(rng.choices(alphabet, k=rng.randrange(60))) for _ in range(300)]
    codes = [*range(0x300), 0x1680, 0x180E, *range(0x2000, 0x2070), 0x3000, *range(0xFF00, 0x10000, 7)]
    every = [f"a{chr(code)}{chr(code)}b{chr(code)}" for code in codes]
    for text in [*NASTY, *drawn, *every]:
        assert clean_prompt(text) == pipeline_wan.prompt_clean(text), ascii(text)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("schÃ¶n, dÃ©jÃ vu, itâ€™s", "schön, déjà vu, it's"),
        ("l&#39;&eacute;t&eacute; &amp;amp;lt;b&amp;amp;gt;", "l'été <b>"),
        ("<b> &amp;amp;lt;", "<b> &lt;"),  # ftfy leaves the entities of a text with tags alone
        ("  A\u00a0CAT\t\tand\n\n\u3000a dog \r\n", "A CAT and a dog"),
        ("lone \ud83d", "lone \ufffd"),
        (" &nbsp; ", ""),
    ],
)
def test_cleaning_repairs_unescapes_twice_and_keeps_case(text, cleaned):
    assert clean_prompt(text) == cleaned


@pytest.mark.parametrize("length", [1, 2, 17, 512])
def test_ids_equal_the_generic_fast_tokenizer_of_transformers(folder, length):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    ours = WanTokenizer.from_folder(folder, 1000)
    prompts = [text for text in NASTY if "surrogate" not in text] + [clean_prompt(text) for text in NASTY]
    expected = theirs(prompts, padding="max_length", max_length=length, truncation=True)
    ids, counts = ours.encode(prompts, length)
    assert ids.dtype == np.int32 and ids.shape == (len(prompts), length)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(counts, np.sum(expected["attention_mask"], axis=1))
    np.testing.assert_array_equal(token_mask(jnp.asarray(ids)), expected["attention_mask"])
    assert ours.count(prompts) == [len(row) for row in theirs(prompts)["input_ids"]]


def test_every_row_ends_with_the_end_token_and_an_empty_prompt_has_nothing_else(folder):
    ids, counts = WanTokenizer.from_folder(folder, 1000).encode(["", "a very " * 99, "cat"], 6)
    assert ids[0].tolist() == [1, 0, 0, 0, 0, 0] and counts.tolist() == [1, 6, 2]
    assert all(row[count - 1] == 1 for row, count in zip(ids, counts, strict=True))


def test_a_file_whose_post_processor_adds_no_end_token_gives_the_same_ids(folder, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "tokenizer.json").write_text(umt5_file(processed=False).to_str())
    a, b = (WanTokenizer.from_folder(path, 1000) for path in (folder, tmp_path / "plain"))
    for mine, other in zip(a.encode(NASTY[:5], 9), b.encode(NASTY[:5], 9), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_unknown_characters_are_bytes_and_not_the_start_token(folder):
    ids, counts = WanTokenizer.from_folder(folder, 1000).encode(["\U0001f431"], 12)
    assert ids[0, counts[0] - 5 : counts[0] - 1].tolist() == [4 + byte for byte in "\U0001f431".encode()]


def test_the_files_are_written_as_they_were_read(folder, tmp_path):
    tokenizer = WanTokenizer.from_folder(folder, 1000)
    tokenizer.encode(NASTY[:3], 9)
    copied = tmp_path / "deep" / "copy"
    tokenizer.save(copied)
    assert sorted(file.name for file in copied.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (copied / name).read_bytes() == (folder / name).read_bytes()
    again = WanTokenizer.from_folder(copied, 1000)
    np.testing.assert_array_equal(again.encode(NASTY[:3], 9)[0], tokenizer.encode(NASTY[:3], 9)[0])


def test_a_tokenizer_may_have_as_many_tokens_as_the_text_encoder_and_no_more(folder):
    size = WanTokenizer.from_folder(folder, 1000).vocab_size
    assert size == 4 + 256 + 1 + 17 + 7  # special tokens, bytes, the space, characters, words
    WanTokenizer.from_folder(folder, size)
    with pytest.raises(UserError, match=rf"tokenizer\.json: {size} tokens, but text_encoder\.vocab_size is {size - 1}"):
        WanTokenizer.from_folder(folder, size - 1)


def test_a_length_without_room_is_an_error(folder):
    with pytest.raises(ValueError, match="length: 0"):
        WanTokenizer.from_folder(folder, 1000).encode(["a"], 0)


def test_a_folder_without_tokenizer_json_is_refused_by_name(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json.*umt5-xxl"):
        WanTokenizer.from_folder(folder, 1000)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Unigram", "vocab": [], "unk_id": 5}}'),
        ("tokenizer_config.json", b"not json"),
        ("special_tokens_map.json", b"[" * 100_000),
    ],
)
def test_a_broken_file_is_refused_by_name(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=str(folder)) as caught:
        WanTokenizer.from_folder(folder, 1000)
    assert "copy" in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (["<s>", "<pad>", "</s>", "<unk>"], r"<pad> has the id 1, and umT5's is 0"),
        (["<pad>", "<s>", "</s>", "<unk>"], r"</s> has the id 2, and umT5's is 1"),
        (["<pad>", "[SEP]", "<s>", "<unk>"], r"</s> is not there"),
    ],
)
def test_another_layout_is_refused(folder, layout, said):
    (folder / "tokenizer.json").write_text(umt5_file(processed=False, layout=layout).to_str())
    with pytest.raises(UserError, match=rf"tokenizer\.json: {said}.*; use the tokenizer of umT5"):
        WanTokenizer.from_folder(folder, 1000)


def test_a_post_processor_that_adds_a_start_token_is_refused(folder):
    raw = json.loads(umt5_file().to_str())
    template = raw["post_processor"]
    template["single"].insert(0, {"SpecialToken": {"id": "<s>", "type_id": 0}})
    template["special_tokens"]["<s>"] = {"id": "<s>", "ids": [2], "tokens": ["<s>"]}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="post_processor"):
        WanTokenizer.from_folder(folder, 1000)


def test_the_embedded_worlds_tokenizer_has_a_token_a_word_and_the_same_ids_in_diffusers(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = make_umt5_tokenizer()
    captions = ["a small red circle moving left on a white background", "a zebra, 7 of them!", "", "A Circle"]
    assert tokenizer.count(captions[:1]) == [11]
    tokenizer.save(tmp_path)
    ids, counts = WanTokenizer.from_folder(tmp_path, tokenizer.vocab_size).encode(captions, 40)
    theirs = transformers.T5TokenizerFast.from_pretrained(str(tmp_path))
    expected = theirs(captions, padding="max_length", max_length=40, truncation=True)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(counts, np.sum(expected["attention_mask"], axis=1))
    assert not np.isin(ids, [2, 3]).any(), "nothing is unknown"
    assert make_umt5_tokenizer(["zebra"]).count(["zebra"]) == [2]
