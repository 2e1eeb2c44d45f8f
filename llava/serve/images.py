"""Pictures as users name them: paths and http(s) URLs, several in one flag.

Special here: nothing is trusted. A URL has a time limit for the whole transfer (looked at behind
each read) and a size limit, whatever the server announces; what arrives must be a picture.

    pictures = [open_picture(source) for source in split_sources("a.png,https://host/b.jpg", ",")]
"""

from __future__ import annotations

import http.client
import os
import time
import urllib.error
import urllib.request
from io import BytesIO
from pathlib import Path

from PIL import Image

from llava.mm_utils import decode_image, load_image

TIMEOUT = 30.0
"""Seconds for a whole transfer."""
LIMIT = 50 * 2**20
"""Bytes a picture may have."""
_CHUNK = 2**16


def split_sources(text: str, sep: str = ",") -> list[str]:
    """The sources in a flag's value; a file whose own name has the separator is one source.

    ValueError for an empty separator and for a value that names nothing.
    """
    if not sep:
        raise ValueError("the separator of image files is empty; give a character such as ','")
    if Path(text).is_file():
        return [text]
    sources = [part.strip() for part in text.split(sep) if part.strip()]
    if not sources:
        raise ValueError(f"{text!r} names no image file")
    return sources


def open_picture(source: str, timeout: float = TIMEOUT, limit: int = LIMIT) -> Image.Image:
    """The picture at a path or an http(s) URL, as RGB.

    Raises FileNotFoundError for a missing file and ValueError, naming the source, for anything that
    is no picture, cannot be fetched in `timeout` seconds or has more than `limit` bytes.
    """
    scheme = source.partition("://")[0].lower() if "://" in source else ""
    if scheme in ("http", "https"):
        return decode_image(BytesIO(fetch(source, timeout, limit)), source)
    if scheme:
        raise ValueError(f"image {source!r}; accepted: a path, http:// or https://")
    return load_image(os.path.expanduser(source))


def fetch(url: str, timeout: float = TIMEOUT, limit: int = LIMIT) -> bytes:
    """The body behind an http(s) URL. ValueError, naming the URL, for whatever goes wrong."""
    request = urllib.request.Request(url, headers={"User-Agent": "llava"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return _read(response, time.monotonic() + timeout, limit)
    except urllib.error.HTTPError as error:
        reason = f"the server answered {error.code} {error.reason}"
    except TimeoutError:
        reason = f"nothing complete came within {timeout:g} s"
    except urllib.error.URLError as error:
        late = isinstance(error.reason, TimeoutError)
        reason = f"no answer within {timeout:g} s" if late else str(error.reason)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(error) or type(error).__name__
    raise ValueError(f"image URL {url} cannot be read: {reason}")


def _read(response: http.client.HTTPResponse, deadline: float, limit: int) -> bytes:
    announced = response.length
    if announced is not None and announced > limit:
        raise ValueError(f"it has {announced} bytes; accepted: up to {limit}")
    body = bytearray()
    # read1 returns what one read of the socket brings, so a slow drip cannot outlast the deadline.
    while chunk := response.read1(_CHUNK):
        body += chunk
        if len(body) > limit:
            raise ValueError(f"it has more than {limit} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    if announced is not None and len(body) != announced:
        raise ValueError(f"the connection ended after {len(body)} of {announced} bytes")
    return bytes(body)
