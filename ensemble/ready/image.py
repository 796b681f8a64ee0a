"""Images for models: decoded, resized, normalised. Needs Pillow, which is imported with the first call.

Use: `{kind: python, call: ensemble.ready.image:decode, inputs: {data: $inputs.jpeg}}`; arguments after the first are
`options`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from remote_ops.errors import InvalidRequest, SignatureError, SpecError
from remote_ops.signature import Array, TensorSpec, describe, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling

__all__ = ["decode", "normalise", "resize"]

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # others run programs, or are read by nobody


def _pillow() -> Any:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("ensemble.ready.image needs pillow: pip install 'remote-ops[ready]'") from error
    return Image, ImageOps


def decode(
    data: Annotated[Array, TensorSpec("data", "any", None)],
    *,
    max_pixels: int = 50_000_000,
    formats: Sequence[str] = _FORMATS,
) -> Annotated[Array, TensorSpec("image", "uint8", (-1, -1, 3))]:
    """Decode one image file to uint8 `[H, W, 3]`, red first, turned upright as its EXIF data says.

    Args:
        data: the bytes of the file: uint8 `[B]`, or one string.
        max_pixels: most pixels it may have, which is checked before they are decoded; each takes 3 bytes.
        formats: which kinds of file are read, of those that Pillow knows.

    Raises:
        InvalidRequest: it is no such file, is cut off, or is larger than allowed.
        ImportError: Pillow is not there.

    Gives the first frame of several, and the high byte of 16-bit greys; transparency is dropped.
    """
    pil, ops = _pillow()
    content = _bytes(data)
    try:
        with pil.open(io.BytesIO(content), formats=tuple(formats)) as image:
            _require_size(image.size, max_pixels)
            return _rgb(ops.exif_transpose(image))
    except InvalidRequest:
        raise
    except Exception as error:  # decoders raise anything of bytes that are no image
        raise InvalidRequest(f"expected an image ({', '.join(formats)}), got {len(content)} bytes: {error}") from error


def _bytes(data: Array) -> bytes:
    if data.dtype == np.uint8 and data.ndim == 1:
        return data.tobytes()
    if data.dtype.kind in "OS" and data.size == 1 and isinstance(content := data.ravel()[0], bytes):
        return content
    expected = "uint8 [B] or one string of bytes"
    raise SignatureError(
        f"input 'data': expected {expected}, got {describe(data)}", name="data", expected=expected, got=describe(data)
    )


def _require_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise InvalidRequest(f"expected an image of at most {max_pixels:,} pixels, got {width} x {height}")


def _rgb(image: Image) -> Array:
    if image.mode.startswith("I"):  # Pillow would clip these to 255
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., np.newaxis], 3, axis=-1)
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def resize(
    image: Annotated[Array, TensorSpec("image", "uint8", None)],
    *,
    size: int | Sequence[int] = 224,
    method: str = "bilinear",
) -> Annotated[Array, TensorSpec("image", "uint8", None)]:
    """Resize uint8 `[H, W, 3]`, or a batch `[N, H, W, 3]`, smoothly as Pillow does.

    Args:
        image: one or more.
        size: `[height, width]`, or one length for both; the proportions change with it.
        method: `nearest`, `box`, `bilinear`, `hamming`, `bicubic` or `lanczos`.

    Raises:
        SpecError: no such size or method.
        SignatureError: `image` is of another shape.
    """
    pil, _ = _pillow()
    height, width = _height_width(size)
    how = _resampling(pil.Resampling, method)
    images = _images(image)
    resized = np.empty((len(images), height, width, 3), np.uint8)
    for one, out in zip(images, resized, strict=True):
        out[:] = np.asarray(pil.fromarray(one).resize((width, height), how))
    return resized[0] if image.ndim == 3 else resized


def _height_width(size: int | Sequence[int]) -> tuple[int, int]:
    pair = [size, size] if isinstance(size, int) else list(size)
    if len(pair) != 2 or not all(isinstance(one, int) and one > 0 for one in pair):
        raise SpecError(f"expected a size [height, width], or one length, each 1 or more, got {size!r}", path="size")
    return pair[0], pair[1]


def _resampling(known: type[Resampling], method: str) -> Resampling:
    names = {one.name.lower(): one for one in known}
    if method not in names:
        hint = did_you_mean(str(method), names)
        raise SpecError(f"no method {method!r}: expected one of {', '.join(names)}{hint}", path="method")
    return names[method]


def _images(image: Array) -> Array:
    """A batch `[N, H, W, 3]` of one image or more."""
    if image.ndim not in (3, 4) or image.shape[-1] != 3 or 0 in image.shape[-3:]:
        expected = "[H, W, 3] or [N, H, W, 3]"
        raise SignatureError(
            f"input 'image': expected {image.dtype} {expected}, got {describe(image)}",
            name="image", expected=expected, got=describe(image),
        )  # fmt: skip
    return image[np.newaxis] if image.ndim == 3 else image


def normalise(
    image: Annotated[Array, TensorSpec("image", "any", None)],
    *,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    scale: float = 255.0,
) -> Annotated[Array, TensorSpec("pixels", "float32", (-1, 3, -1, -1))]:
    """Turn `[H, W, 3]` or `[N, H, W, 3]` of uint8 or float32 into float32 `[N, 3, H, W]`: (x / scale - mean) / std.

    Args:
        image: one image, which becomes a batch of one, or more.
        mean, std: one number, or one for each of red, green and blue, of x / scale.
        scale: what 1.0 is in `image`.

    Raises:
        SpecError: no such mean or std.
        SignatureError: `image` is of another dtype or shape.
    """
    if image.dtype not in (np.uint8, np.float32):
        expected = "uint8 or float32"
        raise SignatureError(
            f"input 'image': expected {expected}, got {describe(image)}",
            name="image", expected=expected, got=describe(image),
        )  # fmt: skip
    planes = _images(image).transpose(0, 3, 1, 2)
    pixels = np.empty(planes.shape, np.float32)
    np.divide(planes, np.float32(scale), out=pixels)
    pixels -= _three("mean", mean)
    pixels /= _three("std", std)
    return pixels


def _three(name: str, values: float | Sequence[float]) -> Array:
    """One number for each of red, green and blue, as `[3, 1, 1]`."""
    numbers = [values] * 3 if isinstance(values, int | float) else list(values)
    if (
        len(numbers) != 3
        or not all(isinstance(one, int | float) for one in numbers)
        or (name == "std" and 0 in numbers)
    ):
        what = "one number or three" + (" other than 0" if name == "std" else "")
        raise SpecError(f"expected {what}, got {values!r}", path=name)
    return np.array(numbers, np.float32).reshape(3, 1, 1)
