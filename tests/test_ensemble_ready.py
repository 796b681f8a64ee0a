"""The ready nodes: images, labels, tokens and boxes."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from ensemble.nodes.function import open_function
from ensemble.ready import boxes, image, labels, tokens
from remote_ops.errors import InvalidRequest, SignatureError, SpecError

RNG = np.random.default_rng(8)
PICTURE = RNG.integers(0, 256, (4, 6, 3), np.uint8)


def file_of(picture: Image.Image, kind: str = "PNG", **options: Any) -> np.ndarray:
    """An image file as uint8 `[B]`."""
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return np.frombuffer(content.getvalue(), np.uint8)


# --------------------------------------------------------------------------- images


def test_an_image_is_decoded_from_bytes_or_one_string() -> None:
    data = file_of(Image.fromarray(PICTURE))
    for given in (data, np.array(data.tobytes(), object), np.array([data.tobytes()], object)):
        decoded = image.decode(given)
        assert decoded.dtype == np.uint8
        assert np.array_equal(decoded, PICTURE)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_common_kinds_of_files_are_read(kind: str) -> None:
    smooth = np.broadcast_to(np.arange(0, 240, 4, np.uint8).reshape(1, 60, 1), (40, 60, 3))
    decoded = image.decode(file_of(Image.fromarray(smooth), kind))
    assert np.abs(decoded.astype(int) - smooth).mean() < 4


UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_an_image_is_turned_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    data = file_of(Image.fromarray(PICTURE), exif=exif)
    assert np.array_equal(image.decode(data), UPRIGHT[orientation](PICTURE))


def test_greys_palettes_and_transparency_become_rgb() -> None:
    grey = PICTURE[..., 0]
    assert np.array_equal(image.decode(file_of(Image.fromarray(grey))), np.stack([grey] * 3, -1))
    wide = grey.astype(np.uint16) << 8 | 7
    assert np.array_equal(image.decode(file_of(Image.fromarray(wide))), np.stack([grey] * 3, -1))
    clear = np.concatenate([PICTURE, grey[..., np.newaxis]], -1)
    assert np.array_equal(image.decode(file_of(Image.fromarray(clear))), PICTURE)
    palette = Image.fromarray(grey >> 6).convert("P")
    data = file_of(palette, transparency=b"\x00\x80\xff")
    assert np.array_equal(image.decode(data), np.asarray(palette.convert("RGB")))


def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    data = file_of(Image.new("1", (20_000, 20_000)))  # 400 million pixels in a small file
    assert data.size < 100_000
    with pytest.raises(InvalidRequest):
        image.decode(data)
    with pytest.raises(InvalidRequest, match="expected an image of at most 23 pixels, got 6 x 4"):
        image.decode(file_of(Image.fromarray(PICTURE)), max_pixels=23)
    assert image.decode(file_of(Image.fromarray(PICTURE)), max_pixels=24).shape == (4, 6, 3)


def test_bytes_that_are_no_image_are_refused_wherever_they_are_cut() -> None:
    for kind in ("PNG", "JPEG", "GIF", "WEBP"):
        data = file_of(Image.fromarray(PICTURE), kind)
        for end in range(0, data.size - 20, 7):
            with pytest.raises(InvalidRequest, match="expected an image"):
                image.decode(data[:end])


def test_only_formats_that_are_asked_for_are_read() -> None:
    with pytest.raises(InvalidRequest, match=r"expected an image \(JPEG\)"):
        image.decode(file_of(Image.fromarray(PICTURE)), formats=["JPEG"])
    with pytest.raises(InvalidRequest):
        image.decode(file_of(Image.fromarray(PICTURE), "EPS"))


@pytest.mark.parametrize("data", [np.zeros((2, 2), np.uint8), np.zeros(3), np.array(["a", "b"], object)], ids=str)
def test_what_is_no_bytes_is_refused(data: np.ndarray) -> None:
    with pytest.raises(SignatureError, match=r"expected uint8 \[B\] or one string of bytes"):
        image.decode(data)


def test_images_are_resized_as_pillow_does_one_or_many() -> None:
    batch = RNG.integers(0, 256, (3, 20, 30, 3), np.uint8)
    batch.flags.writeable = False
    resized = image.resize(batch, size=[8, 10], method="bicubic")
    assert resized.shape == (3, 8, 10, 3)
    for one, out in zip(batch, resized, strict=True):
        assert np.array_equal(out, np.asarray(Image.fromarray(one).resize((10, 8), Image.Resampling.BICUBIC)))
        assert np.array_equal(out, image.resize(one, size=(8, 10), method="bicubic"))
    assert image.resize(batch[:0], size=5).shape == (0, 5, 5, 3)


def test_a_size_or_method_that_is_none_is_said() -> None:
    for size in (0, [1], [1, 2, 3], [1.5, 2]):
        with pytest.raises(SpecError, match=r"expected a size \[height, width\]"):
            image.resize(PICTURE, size=size)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"did you mean 'bilinear'\?"):
        image.resize(PICTURE, method="bilinaer")
    for wrong in (PICTURE[..., :2], PICTURE[0], PICTURE[:0]):
        with pytest.raises(SignatureError, match=r"expected uint8 \[H, W, 3\] or \[N, H, W, 3\]"):
            image.resize(wrong)


def test_images_are_normalised_as_torchvision_does() -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    planes = torch.tensor(PICTURE).permute(2, 0, 1).to(torch.float32).div(255)
    wanted = (planes - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    given = image.normalise(PICTURE, mean=mean, std=std)
    assert (given.dtype, given.shape) == (np.float32, (1, 3, 4, 6))
    assert np.array_equal(given[0], wanted.numpy())
    batch = np.stack([PICTURE, PICTURE])
    assert np.array_equal(image.normalise(batch, mean=mean, std=std), np.concatenate([given, given]))
    assert np.array_equal(image.normalise(PICTURE.astype(np.float32), mean=mean, std=std), given)
    assert image.normalise(batch[:0]).shape == (0, 3, 4, 6)


def test_a_mean_or_std_that_is_none_is_said() -> None:
    for options in ({"mean": [1, 2]}, {"std": 0}, {"std": [1, 1, 0]}, {"mean": ["a", 1, 2]}):
        with pytest.raises(SpecError, match="expected one number or three"):
            image.normalise(PICTURE, **options)  # type: ignore[arg-type]
    with pytest.raises(SignatureError, match="expected uint8 or float32, got int64"):
        image.normalise(PICTURE.astype(np.int64))


# --------------------------------------------------------------------------- labels


def test_the_most_likely_classes_have_names(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes("\N{ZERO WIDTH NO-BREAK SPACE}cat\r\ndog\n\N{CJK UNIFIED IDEOGRAPH-72D0}\n".encode())
    probs = np.array([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]], np.float32)
    best = labels.top_k(k=2, labels=str(file))
    given = best.infer({"probs": probs})
    assert given["labels"].tolist() == [
        ["dog", "\N{CJK UNIFIED IDEOGRAPH-72D0}"],
        ["cat", "\N{CJK UNIFIED IDEOGRAPH-72D0}"],
    ]
    assert given["scores"].tolist() == [[0.5, np.float32(0.3)], [np.float32(0.4)] * 2]
    assert [str(spec) for spec in best.signature.inputs] == ["float32 [-1, 3]"]
    assert [str(spec) for spec in best.signature.outputs] == ["string [-1, 2]", "float32 [-1, 2]"]
    assert best.infer({"probs": probs[:0]})["labels"].shape == (0, 2)


def test_classes_without_names_are_numbers_and_nan_comes_last() -> None:
    probs = np.array([[np.nan, 0.5, 0.7, 0.7]], np.float32)
    assert labels.top_k(k=4).infer({"probs": probs})["labels"].tolist() == [["2", "3", "1", "0"]]
    with pytest.raises(InvalidRequest, match=r"expected 5 classes or more, got \[1, 4\]"):
        labels.top_k().infer({"probs": probs})


def test_labels_that_do_not_fit_are_said_when_the_node_is_made(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "other.txt").write_bytes(b"\xff\xfe\xff")
    for file, words in (("no.txt", "cannot read"), ("empty.txt", "empty file"), ("other.txt", "cannot read")):
        with pytest.raises(SpecError, match=words):
            labels.top_k(labels=str(tmp_path / file))
    for k in (0, 3, True, 1.5):
        with pytest.raises(SpecError, match="expected k from 1 to 2"):
            labels.top_k(k=k, labels=["a", "b"])  # type: ignore[arg-type]
    with pytest.raises(SignatureError, match=r"expected float32 \[-1, 2\]"):
        labels.top_k(k=1, labels=["a", "b"]).infer({"probs": np.ones((1, 3), np.float32)})


# --------------------------------------------------------------------------- tokens


@pytest.fixture
def tokeniser_file(tmp_path: Path) -> str:
    words = {word: place for place, word in enumerate(["[UNK]", "[PAD]", "call", "a", "model", "é"])}
    tokeniser = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokeniser.pre_tokenizer = pre_tokenizers.Whitespace()
    tokeniser.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def test_texts_become_tokens_and_a_mask(tokeniser_file: str) -> None:
    tokenise = tokens.tokenise(file=tokeniser_file)
    given = tokenise.infer({"text": np.array(["call a model", "é".encode(), ""], object)})
    assert given["ids"].tolist() == [[2, 3, 4], [5, 1, 1], [1, 1, 1]]
    assert given["mask"].tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert {array.dtype for array in given.values()} == {np.dtype(np.int64)}
    assert tokenise.infer({"text": np.empty(0, object)})["ids"].shape == (0, 0)
    assert tokenise.infer({"text": np.array(["a a"])})["mask"].tolist() == [[1, 1]]


def test_texts_are_cut_and_filled_up_to_a_length(tokeniser_file: str) -> None:
    cut = tokens.tokenise(file=tokeniser_file, max_length=2)
    assert cut.infer({"text": np.array(["call a model", "a"], object)})["ids"].tolist() == [[2, 3], [3, 1]]
    full = tokens.tokenise(file=tokeniser_file, max_length=4, padding="max_length")
    assert full.infer({"text": np.array(["a"], object)})["ids"].tolist() == [[3, 1, 1, 1]]
    assert full.infer({"text": np.empty(0, object)})["mask"].shape == (0, 4)
    assert str(full.signature.outputs[0]) == "int64 [-1, 4]"


def test_padding_of_the_file_is_kept(tokeniser_file: str) -> None:
    changed = Tokenizer.from_file(tokeniser_file)
    changed.enable_padding(pad_id=0, pad_token="[UNK]", direction="left", length=9)
    changed.save(tokeniser_file)
    given = tokens.tokenise(file=tokeniser_file).infer({"text": np.array(["a a", "a"], object)})
    assert given["ids"].tolist() == [[3, 3], [0, 3]]


def test_a_tokeniser_that_cannot_be_opened_is_said_when_the_node_is_made(tokeniser_file: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    for file in (str(tmp_path / "no.json"), str(tmp_path / "bad.json")):
        with pytest.raises(SpecError, match="cannot open the tokeniser"):
            tokens.tokenise(file=file)
    with pytest.raises(SpecError, match=r"options: \{file: tokenizer.json\}"):
        tokens.tokenise()
    for options in ({"padding": "no"}, {"padding": "max_length"}):
        with pytest.raises(SpecError, match="expected 'longest', or 'max_length' and a max_length"):
            tokens.tokenise(file=tokeniser_file, **options)
    with pytest.raises(InvalidRequest, match="expected UTF-8"):
        tokens.tokenise(file=tokeniser_file).infer({"text": np.array([b"\xff"], object)})


# --------------------------------------------------------------------------- boxes


def by_hand(boxes_: Any, scores: Any, classes: Any, overlap: float) -> list[int]:
    """The definition, box by box in plain Python, in float32 as `torchvision.ops.nms` computes."""
    kept: list[int] = []
    for place in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        x1, y1, x2, y2 = boxes_[place]
        for other in kept:
            u1, v1, u2, v2 = boxes_[other]
            common = max(min(x2, u2) - max(x1, u1), np.float32(0)) * max(min(y2, v2) - max(y1, v1), np.float32(0))
            union = (u2 - u1) * (v2 - v1) + (x2 - x1) * (y2 - y1) - common
            if union > 0 and float(common / union) > overlap and classes[place] == classes[other]:
                break
        else:
            kept.append(place)
    return kept


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_boxes_are_kept_as_the_definition_says(overlap: float) -> None:
    for count in (1, 2, 10, 60):
        corners = np.sort(RNG.integers(0, 12, (count, 2, 2)), axis=1).astype(np.float32)
        found, scores = corners.reshape(count, 4), RNG.integers(0, 6, count).astype(np.float32)
        classes = RNG.integers(0, 2, count)
        for given in (None, classes):
            keep = boxes.non_maximum_suppression(found, scores, given, overlap=overlap)
            wanted = by_hand(found, scores, classes if given is not None else [0] * count, overlap)
            assert keep.dtype == np.int64
            assert keep.tolist() == wanted


def test_no_boxes_are_no_boxes() -> None:
    keep = boxes.non_maximum_suppression(np.empty((0, 4), np.float32), np.empty(0, np.float32))
    assert (keep.dtype, keep.shape) == (np.int64, (0,))


def test_boxes_may_be_left_out_by_score_or_number() -> None:
    found = np.array([[0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 5, 5], [0, 0, 1, 1]], np.float32)
    scores = np.array([0.2, 0.9, 0.5, 0.3], np.float32)
    assert boxes.non_maximum_suppression(found, scores).tolist() == [1, 2, 3]
    assert boxes.non_maximum_suppression(found, scores, min_score=0.4).tolist() == [1, 2]
    assert boxes.non_maximum_suppression(found, scores, at_most=1).tolist() == [1]
    assert boxes.non_maximum_suppression(found, scores, at_most=0).tolist() == []


def test_boxes_without_scores_are_refused() -> None:
    with pytest.raises(SignatureError, match=r"'scores': expected one for each of float32 \[2, 4\], got float32 \[1\]"):
        boxes.non_maximum_suppression(np.ones((2, 4), np.float32), np.ones(1, np.float32))


# --------------------------------------------------------------------------- in a graph


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize(
    ("call", "options", "inputs", "wanted"),
    [
        ("image:decode", {"max_pixels": 9}, ["data"], ["image"]),
        ("image:resize", {"size": [8, 8]}, ["image"], ["image"]),
        ("image:normalise", {}, ["image"], ["pixels"]),
        ("labels:top_k", {"k": 1}, ["probs"], ["labels", "scores"]),
        ("labels:top_k", {}, ["probs"], ["labels", "scores"]),
        ("tokens:tokenise", {"file": None}, ["text"], ["ids", "mask"]),
        ("boxes:non_maximum_suppression", {"overlap": 0.4}, ["boxes", "scores"], ["keep"]),
        ("boxes:non_maximum_suppression", {}, ["boxes", "scores", "classes"], ["keep"]),
    ],
)
def test_ready_nodes_are_opened_by_their_names(
    call: str, options: dict[str, Any], inputs: list[str], wanted: list[str], by_name: bool, tokeniser_file: str
) -> None:
    options = {**options, "file": tokeniser_file} if "file" in options else options
    servable = open_function(f"ensemble.ready.{call}", ".", options, inputs if by_name else len(inputs), ())
    assert [spec.name for spec in servable.signature.inputs] == inputs
    assert [spec.name for spec in servable.signature.outputs] == wanted


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (image.decode, "uint8 [-1, -1, 3]"),
        (image.resize, "uint8 of any shape"),
        (image.normalise, "float32 [-1, 3, -1, -1]"),
        (boxes.non_maximum_suppression, "int64 [-1]"),
    ],
)
def test_annotations_say_what_comes_out(function: Any, wanted: str) -> None:
    (spec,) = get_type_hints(function, include_extras=True)["return"].__metadata__
    assert str(spec) == wanted


# --------------------------------------------------------------------------- optional libraries


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for call in (lambda: image.decode(np.zeros(3, np.uint8)), lambda: image.resize(PICTURE)):
        with pytest.raises(ImportError, match=r"ensemble.ready.image needs pillow: pip install 'remote-ops\[ready\]'"):
            call()
    with pytest.raises(ImportError, match=r"ensemble.ready.tokens needs tokenizers: pip install 'remote-ops\[ready\]'"):
        tokens.tokenise(file="tokenizer.json")
    assert image.normalise(PICTURE).shape == (1, 3, 4, 6)
