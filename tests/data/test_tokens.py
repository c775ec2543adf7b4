"""Calibration and evaluation tokens: drawn as the Wanda code draws them, with BOS as the policy says, and hashed."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import datasets
import huggingface_hub
import pandas
import pytest
import torch
from support import contains, tiny_tokenizer

from dass_exp.config.settings import CalibrationConfig
from dass_exp.data import texts
from dass_exp.data.texts import HubText, OfflineText, Text, TextFile
from dass_exp.data.tokens import Tokens, calibration_tokens, encode, evaluation_windows
from dass_exp.errors import UserError

BOS = 1000


class Characters:
    """A tokenizer whose tokens are characters, so that every expected number is known."""

    bos_token_id = BOS

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [ord(character) for character in text]
        return {"input_ids": [BOS, *ids] if add_special_tokens else ids}


@dataclass(frozen=True)
class Documents(Text):
    """A text of the test's own."""

    content: tuple[str, ...]
    identity = None

    def documents(self):
        return list(self.content)


LENGTHS = random.Random(7)
TEXT = Documents(
    tuple("".join(chr(97 + LENGTHS.randrange(26)) for _ in range(LENGTHS.choice([3, 8, 9, 30, 60]))) for _ in range(40))
)
TOKENIZER = Characters()


def ids_of(text: str) -> list[int]:
    return [ord(character) for character in text]


def calibrated(
    sampling: str,
    count: int,
    length: int,
    bos: str = "never",
    seed: int = 0,
    separator: str = "\n\n",
    text: Text = TEXT,
) -> list[list[int]]:
    config = CalibrationConfig(sampling=sampling, num_samples=count, seq_len=length, separator=separator)
    return calibration_tokens(text, config, TOKENIZER, bos, seed).ids.tolist()


def evaluated(context: int, bos: str = "never", limit: int | None = None, text: Text = TEXT) -> list[list[int]]:
    return evaluation_windows(text, context, limit, TOKENIZER, bos).ids.tolist()


def joined(windows: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(windows))


# Calibration


def wanda_c4(documents: list[str], count: int, length: int, seed: int, head: tuple[int, ...] = ()) -> list[list[int]]:
    """The loop of get_c4 in lib/data.py of the Wanda code: a document that is longer, then a crop."""
    draw, samples = random.Random(seed), []
    for _ in range(count):
        while True:
            i = draw.randint(0, len(documents) - 1)
            enc = [*head, *ids_of(documents[i])]
            if len(enc) > length:
                break
        i = draw.randint(0, len(enc) - length - 1)
        samples.append(enc[i : i + length])
    return samples


def wanda_wikitext2(
    documents: list[str], count: int, length: int, seed: int, separator: str, head: tuple[int, ...] = ()
) -> list[list[int]]:
    """The loop of get_wikitext2: crops of everything joined."""
    draw, enc = random.Random(seed), [*head, *ids_of(separator.join(documents))]
    starts = [draw.randint(0, len(enc) - length - 1) for _ in range(count)]
    return [enc[i : i + length] for i in starts]


@pytest.mark.parametrize("seed", [0, 1, 42])
@pytest.mark.parametrize("length", [4, 8, 9, 29])
def test_documents_are_drawn_as_the_wanda_code_draws_them(seed, length):
    for bos, head in (("never", ()), ("stream", (BOS,))):
        expected = wanda_c4(TEXT.documents(), 12, length, seed, head)
        assert calibrated("document", 12, length, bos, seed) == expected


@pytest.mark.parametrize("seed", [0, 1, 42])
@pytest.mark.parametrize("separator", [" ", "\n\n"])
def test_windows_of_the_joined_text_are_drawn_as_the_wanda_code_draws_them(seed, separator):
    for bos, head in (("never", ()), ("stream", (BOS,))):
        expected = wanda_wikitext2(TEXT.documents(), 12, 16, seed, separator, head)
        assert calibrated("joined", 12, 16, bos, seed, separator) == expected


@pytest.mark.parametrize("sampling", ["joined", "document"])
def test_the_draws_do_not_disturb_the_global_generator(sampling):
    random.seed(5)
    before = random.getstate()
    calibrated(sampling, 4, 8)
    assert random.getstate() == before


@pytest.mark.parametrize("sampling", ["joined", "document"])
def test_a_window_starts_with_the_token_and_counts_it(sampling):
    windows = calibrated(sampling, 10, 9, "window")
    assert {len(window) for window in windows} == {9}
    assert {window[0] for window in windows} == {BOS}
    assert all(BOS not in window[1:] for window in windows)
    assert [window[1:] for window in windows] == calibrated(sampling, 10, 8)  # the same places as without it


@pytest.mark.parametrize("sampling", ["joined", "document"])
def test_never_means_never(sampling):
    assert BOS not in joined(calibrated(sampling, 40, 8, "never"))


def test_stream_puts_the_token_once_at_the_head_of_the_text():
    windows = {tuple(window) for window in calibrated("joined", 50, 3, "stream", text=Documents(("abcdef",)))}
    # like the Wanda code, never the last start
    assert windows == {(BOS, 97, 98), (97, 98, 99), (98, 99, 100), (99, 100, 101)}


def test_every_document_longer_than_the_window_can_be_drawn_and_no_shorter_one():
    windows = {"".join(map(chr, window)) for window in calibrated("document", 400, 9)}
    sources = {document for document in TEXT.documents() if any(window in document for window in windows)}
    assert sources == {document for document in TEXT.documents() if len(document) > 9}


@pytest.mark.parametrize(
    ("sampling", "length", "word"), [("joined", 100_000, "tokens"), ("document", 61, "sampling=joined")]
)
def test_a_text_that_is_too_short_is_a_one_line_error(sampling, length, word):
    with pytest.raises(UserError) as caught:
        calibrated(sampling, 1, length)
    assert contains(str(caught.value), [f"calibration.seq_len={length}:", word])


@pytest.mark.parametrize(("name", "value"), [("sampling", "row"), ("num_samples", 0), ("seq_len", 1)])
def test_invalid_calibration_settings_are_refused(name, value):
    with pytest.raises(UserError, match=f"^calibration.{name}="):
        CalibrationConfig(**{name: value})


# Evaluation


def test_evaluation_windows_follow_each_other_and_the_rest_is_dropped():
    stream = ids_of("\n\n".join(TEXT.documents()))
    windows = evaluated(100)
    assert len(windows) == len(stream) // 100
    assert len(stream) % 100
    assert joined(windows) == stream[: len(windows) * 100]


@pytest.mark.parametrize("limit", [3, 10_000])
def test_a_limit_keeps_the_first_windows(limit):
    assert evaluated(100, limit=limit) == evaluated(100)[:limit]


def test_the_token_counts_in_the_context_of_an_evaluation_window():
    windows = evaluated(100, "window")
    assert {(len(window), window[0]) for window in windows} == {(100, BOS)}
    assert joined(window[1:] for window in windows) == joined(evaluated(99))


def test_the_token_stands_once_at_the_head_of_an_evaluation_stream():
    whole = joined(evaluated(100, "stream"))
    assert whole[0] == BOS
    assert BOS not in whole[1:]
    assert whole[1:] == ids_of("\n\n".join(TEXT.documents()))[: len(whole) - 1]


def test_no_token_unless_asked():
    assert BOS not in joined(evaluated(100))


def test_one_window_is_enough_and_less_is_not():
    text = Documents(("abcd",))
    assert evaluated(4, text=text) == [[97, 98, 99, 100]]
    assert evaluated(5, "window", text=text) == [[BOS, 97, 98, 99, 100]]
    with pytest.raises(UserError) as caught:
        evaluated(5, text=text)
    assert contains(str(caught.value), ["eval.perplexity.context=5:", "4 tokens"])


class NoTokenizer:
    """Stands for one that would take an hour."""

    bos_token_id = BOS

    def __call__(self, *args, **settings):
        pytest.fail("the text was tokenised")


@pytest.mark.parametrize("sampling", ["joined", "document"])
def test_a_length_far_beyond_the_text_is_refused_before_it_is_tokenised(sampling):
    config = CalibrationConfig(sampling=sampling, num_samples=4, seq_len=10**9)
    with pytest.raises(UserError, match=r"^calibration.seq_len=1000000000: the .* has \d+ characters"):
        calibration_tokens(TEXT, config, NoTokenizer(), "never", 0)
    with pytest.raises(UserError, match=r"^eval.perplexity.context=1000000000: the .* has \d+ characters"):
        evaluation_windows(TEXT, 10**9, None, NoTokenizer(), "never")


# Tokens


@pytest.mark.parametrize(("bos", "expected"), [("never", [97, 98]), ("window", [97, 98]), ("stream", [BOS, 97, 98])])
def test_only_the_stream_policy_adds_a_token(bos, expected):
    ids = encode(TOKENIZER, "ab", bos)
    assert ids.tolist() == expected
    assert ids.dtype == torch.int64


def test_a_real_tokenizer_gives_the_text_back():
    tokenizer = tiny_tokenizer()
    text = "In 1903 two brothers flew; it took 12 seconds. Ünïcode, too."
    assert tokenizer.decode(encode(tokenizer, text, "never")) == text
    assert encode(tokenizer, text, "stream")[0] == tokenizer.bos_token_id


def test_the_hash_is_that_of_the_ids_as_little_endian_64_bit_numbers():
    ids = torch.tensor([[1, 2], [3, 4]])
    expected = hashlib.sha256(b"".join(number.to_bytes(8, "little") for number in (1, 2, 3, 4))).hexdigest()
    assert Tokens.of(ids).sha256 == expected
    assert Tokens.of(torch.tensor([[1, 3], [2, 4]]).T).sha256 == expected  # whatever the strides


def test_a_token_without_an_embedding_is_refused():
    windows = Tokens.of(torch.tensor([[1, 2], [3, 7]]))
    assert windows.checked(8, "m") is windows
    with pytest.raises(UserError) as caught:
        windows.checked(7, "m")
    assert contains(str(caught.value), ["model.path=m:", "the token 7", "7 rows"])


def test_the_hash_changes_with_the_tokens():
    config = CalibrationConfig(sampling="joined", num_samples=4, seq_len=16)
    draws = (("never", 0), ("never", 1), ("window", 0), ("never", 0))
    hashes = [calibration_tokens(TEXT, config, TOKENIZER, bos, seed).sha256 for bos, seed in draws]
    assert len(set(hashes)) == 3
    assert hashes[3] == hashes[0]


# The real texts


def test_the_c4_text():
    documents = OfflineText("c4").documents()
    assert len(documents) == 584
    assert all(document.strip() for document in documents)
    assert sum(len(document.split()) for document in documents) == pytest.approx(220_000, rel=0.03)


def test_the_wikipedia_text_has_no_markup_and_no_bare_titles():
    documents = OfflineText("wikipedia").documents()
    assert len(documents) > 500
    assert not [document for document in documents if "<doc" in document or "</doc" in document]
    assert all("\n" in document for document in documents)
    assert all(document == document.strip() for document in documents)


@pytest.mark.parametrize("asset", ["c4", "wikipedia"])
def test_even_and_odd_parts_make_up_the_whole(asset):
    whole, even, odd = (OfflineText(asset, part).documents() for part in ("all", "even", "odd"))
    assert (even, odd) == (whole[::2], whole[1::2])


def test_no_wikipedia_article_is_in_both_parts():
    even, odd = (OfflineText("wikipedia", part).documents() for part in ("even", "odd"))
    assert len(even) == pytest.approx(len(odd), abs=1)
    assert not set(even) & set(odd)


def test_the_identity_of_a_text_is_its_content_and_its_part():
    parts = [OfflineText(asset, part) for asset in ("c4", "wikipedia") for part in ("all", "even", "odd")]
    assert len({repr(sorted(text.identity.items())) for text in parts}) == 6
    assert OfflineText("c4").identity["sha256"].startswith("2daf1ef1")


@pytest.mark.parametrize(("asset", "part", "name"), [("reddit", "all", "asset"), ("c4", "third", "part")])
def test_an_unknown_text_is_refused(asset, part, name):
    with pytest.raises(UserError, match=rf"^text\.{name}="):
        OfflineText(asset, part)


# A data set of the hub


def test_a_hub_text_loads_the_data_set_of_its_settings(tmp_path, monkeypatch):
    """A folder with JSON files is loaded as a data set of the hub is."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")
    (tmp_path / "part.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "other.jsonl").write_text('{"text": "three"}\n')
    assert HubText(str(tmp_path), "train", data_file="part.jsonl").documents() == ["one", "two"]
    assert sorted(HubText(str(tmp_path), "train").documents()) == ["one", "three", "two"]


COMMIT = "c0ffee" * 6 + "c0ff"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The hub's cache, in which the main branch of two data sets is at a commit."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    texts._commit_of.cache_clear()
    for name in ("allenai--c4", "a--b"):
        (tmp_path / f"datasets--{name}" / "refs").mkdir(parents=True)
        (tmp_path / f"datasets--{name}" / "refs" / "main").write_text(COMMIT)
    yield tmp_path
    texts._commit_of.cache_clear()


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize(("revision", "commit"), [(None, COMMIT), ("main", COMMIT), ("decade" * 6 + "deca",) * 2])
def test_a_hub_text_passes_its_configuration_and_commit_on(monkeypatch, revision, commit):
    arguments = {}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *names, **settings: arguments.update(settings, names=names) or {"text": []}
    )
    HubText("allenai/c4", "train", name="en", revision=revision).documents()
    assert arguments == {"names": ("allenai/c4", "en"), "data_files": None, "split": "train", "revision": commit}


def test_another_commit_of_a_hub_text_is_another_text(hub_cache):
    before = HubText("a/b", "train").identity
    (hub_cache / "datasets--a--b" / "refs" / "main").write_text("decade" * 6 + "deca")
    texts._commit_of.cache_clear()
    assert HubText("a/b", "train").identity != before
    assert before["revision"] == COMMIT


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("revision", [None, "v2"])
def test_a_hub_text_whose_commit_is_unknown_is_refused(revision):
    with pytest.raises(UserError) as caught:
        _ = HubText("another/one", "train", revision=revision).identity
    assert contains(str(caught.value), [f"text.revision={revision or 'null'}:", "another/one", "set the commit"])


def test_a_local_text_is_known_by_its_content_wherever_it_lies(tmp_path):
    identities = []
    for place, line in (("one", "x"), ("two", "x"), ("three", "y")):
        (tmp_path / place).mkdir()
        file = tmp_path / place / "part.jsonl"
        file.write_text(f'{{"text": "{line}"}}\n')
        identities.append([HubText(str(file.parent), "train"), HubText("json", "train", data_file=str(file))])
    for one, same, other in zip(*identities, strict=True):
        assert one.identity == same.identity != other.identity
        assert str(tmp_path) not in repr(one.identity)


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_text_without_a_network_is_a_one_line_error(monkeypatch):
    def load_dataset(*args, **settings):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        HubText("allenai/c4", "train").documents()
    assert contains(str(caught.value), ["allenai/c4", "network", "protocol=demo", "no route"])


@pytest.mark.usefixtures("hub_cache")
def test_every_field_of_a_hub_text_is_in_its_identity():
    base = HubText("a/b", "train")
    another = {"path": "allenai/c4", "revision": "decade" * 6 + "deca"}
    changed = [replace(base, **{field.name: another.get(field.name, "x")}) for field in fields(HubText)]
    assert len({repr(text.identity) for text in (base, *changed)}) == 6


# A file of one's own

ROWS = [
    "",
    " = Title = \n",
    "",
    " First line , with ünïcode and \u2028 inside . \n",
    " Second . \n",
    "",
    " = = Next = = \n",
    "",
]
WIKI_RAW = " \n = Title = \n \n First line , with ünïcode and \u2028 inside . \n Second . \n \n = = Next = = \n \n"


@pytest.fixture
def rows_as_files(tmp_path, monkeypatch):
    """The rows of a data set, as WikiText has them, in every format."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")
    pandas.DataFrame({"id": range(len(ROWS)), "text": ROWS}).to_parquet(tmp_path / "test.parquet")
    contents = {
        "test.jsonl": "".join(json.dumps({"text": row}) + "\n" for row in ROWS),
        "test.txt": "\n\n".join(ROWS),
        "test.raw": WIKI_RAW,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content.encode())
    for path in list(tmp_path.glob("test.*")):
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    return tmp_path


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "raw", "txt"])
def test_a_file_gives_the_windows_that_the_hub_gives_of_the_same_rows(rows_as_files, kind, ending):
    hub = HubText("parquet", "test", data_file=str(rows_as_files / "test.parquet"))
    own = TextFile(str(rows_as_files / f"test.{kind}{ending}"))
    assert hub.documents() == ROWS
    assert kind == "txt" or own.documents() == ROWS
    tokenizer = tiny_tokenizer()
    for bos in ("never", "stream", "window"):
        one, other = (evaluation_windows(text, 8, None, tokenizer, bos) for text in (hub, own))
        assert len(one.ids) > 3
        assert one.sha256 == other.sha256


def test_a_text_is_scored_as_it_stands(tmp_path):
    content = "one\ntwo\n\n\n\nthree\n\n four\n"
    (tmp_path / "a.txt").write_text(content)
    text = TextFile(str(tmp_path / "a.txt"))
    assert text.documents() == ["one\ntwo", "", "three", " four\n"]
    assert joined(evaluated(1, text=text)) == ids_of(content)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())  # as Windows writes it
    assert joined(evaluated(1, text=text)) == ids_of(content)


def test_a_file_is_known_by_its_content_and_by_how_it_is_read(rows_as_files, tmp_path):
    path = rows_as_files / "test.jsonl"
    base, elsewhere = TextFile(str(path)).identity, tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "copy.json").write_bytes(path.read_bytes())
    assert base["file"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert base == TextFile(f"{path}.gz").identity == TextFile(str(elsewhere / "copy.json")).identity
    assert str(tmp_path) not in repr(base)
    (tmp_path / "test2.txt").write_bytes(path.read_bytes())
    others = [TextFile(str(path), "other"), TextFile(str(tmp_path / "test2.txt"))]
    path.write_text(path.read_text() + '{"text": "more"}\n')
    others.append(TextFile(str(path)))
    assert len({repr(identity) for identity in (base, *(text.identity for text in others))}) == 4


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, ["text.path=", "missing.txt", "no such file"]),
        ("empty.txt", b"", ["text.path=", "holds no text"]),
        ("blank.txt", b" \n\n \n", ["text.path=", "holds no text"]),
        ("empty.jsonl", b"", ["text.path=", "holds no text"]),
        ("latin.txt", "caf\u00e9".encode("latin-1"), ["text.path=", "not UTF-8 (byte 3)", "iconv"]),
        ("latin.jsonl", b'{"text": "caf\xe9"}', ["text.path=", "not UTF-8"]),
        ("other.jsonl", b'{"text": "a"}\n{"content": "b"}\n', ["text.column=text", "line 2 of", "it has content"]),
        ("list.jsonl", b"[1]\n", ["text.column=text", "line 1 of", "no object"]),
        ("number.jsonl", b'{"text": 3}\n', ["text.column=text", "line 1 of", "it has text"]),
        ("broken.jsonl", b'{"text": "a"}\n{"text"\n', ["text.path=", "line 2 is no JSON", "one object a line"]),
        ("broken.parquet", b"PAR1", ["text.path=", "no parquet file"]),
        ("broken.txt.gz", b"text", ["text.path=", "cannot be read"]),
        ("cut.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], ["text.path=", "cannot be read"]),
    ],
)
def test_a_file_that_is_no_text_is_a_one_line_error(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        TextFile(str(tmp_path / name)).documents()
    assert contains(str(caught.value), words)


@pytest.mark.parametrize("rows", [{"content": ["a"]}, {"text": [1, 2]}, {"text": ["a", None]}])
def test_a_table_without_a_column_of_texts_is_a_one_line_error(tmp_path, rows):
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError) as caught:
        TextFile(str(tmp_path / "a.parquet")).documents()
    assert contains(str(caught.value), ["text.column=text:", "a.parquet", f"it has {next(iter(rows))}"])


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.gz", "a.txt.zip"])
def test_a_file_of_another_kind_is_refused(name):
    with pytest.raises(UserError, match=r"^text\.path=.*expected a file whose name ends in \.txt, "):
        TextFile(name)


def test_a_folder_is_no_text(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(UserError, match=r"^text\.path=.*a\.txt: expected a file, found a folder"):
        _ = TextFile(str(tmp_path / "a.txt")).identity
