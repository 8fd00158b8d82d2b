"""Image files as pixels: whatever their size, mode and turn, upright RGB squares come out. On all cores.

Run as a program, this file is the worker that `decode_all` starts: it needs none of the package, and so starts at once.
"""

import contextlib
import errno
import os
import pickle
import queue
import signal
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif"}

CHUNK_FILES, CHUNK_BYTES = 64, 4 * 2**20  # what a worker is given at a time: so many files or, decoded, bytes at most

Image.MAX_IMAGE_PIXELS = None  # the user's own files are no attack, however large


class DecodeError(ValueError):
    """A file is not an image that can be used; the message says why."""


class ReadError(OSError):
    """A file cannot be read, which says nothing about the image in it: no permission, or a disk at fault."""


def decode(path: Path, image_size: int) -> NDArray[np.uint8]:
    """(image_size, image_size, 3): the short side is scaled to `image_size`, and the middle kept.

    Turned as its EXIF data say; 16-bit greys are scaled to 8 bits; transparent parts become white; of an animation it is
    the first picture. Raises `DecodeError` if the file cannot be decoded, or holds numbers of an unknown range, and
    `ReadError` if it is there but cannot be read.
    """
    try:
        with Image.open(path) as image:
            # a large JPEG is decoded at a half, quarter or eighth of its size, still twice what is needed
            image.draft(None, (2 * image_size, 2 * image_size))
            upright = _to_rgb(ImageOps.exif_transpose(image), image.format)
            side = min(upright.size)
            left, top = (upright.width - side) / 2, (upright.height - side) / 2
            square = (left, top, left + side, top + side)
            return np.asarray(upright.resize((image_size, image_size), Image.Resampling.BILINEAR, box=square))
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # a decoder may raise anything for a broken file
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise ReadError(error.errno, error.strerror, str(path)) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        # Pillow and Python name the file, which the caller does too
        for name in (f" {str(path)!r}", f": {str(path)!r}"):
            reason = reason.replace(name, "")
        raise DecodeError(reason.strip(":")) from error


def _to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    # mode I is how Pillow holds 16 bits of some formats, but a TIFF's 16 bits are I;16
    if image.mode == "F" or (image.mode == "I" and file_format == "TIFF"):
        raise DecodeError("it holds numbers of 32 bits, whose range is not known")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion would cut them off at 255
        values: NDArray[Any] = np.asarray(image)
        return Image.fromarray((values // 256).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        on_white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(on_white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def decode_all(paths: Sequence[Path], image_size: int, num_workers: int) -> Iterator[bytes | str]:
    """The pixels of each file, in order, or what is wrong with it; by `num_workers` processes, where there is work for them.

    Processes, as most of the work on a small file holds Python's lock: threads would wait for one another. Raises
    `ReadError` for a file that is there but cannot be read.
    """
    size = max(1, min(CHUNK_FILES, CHUNK_BYTES // (3 * image_size**2)))
    chunks = [paths[i : i + size] for i in range(0, len(paths), size)]
    num_workers = min(num_workers, len(chunks))
    if num_workers < 2:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about what it reads all the same
            yield from _decode_chunk(paths, image_size)
        return
    idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()

    def decode_chunk(chunk: Sequence[Path]) -> list[bytes | str]:
        worker = idle.get()
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            pickle.dump(chunk, worker.stdin)
            worker.stdin.flush()
            answer: list[bytes | str] | Exception = pickle.load(worker.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise RuntimeError(f"a process that decoded {chunk[0]} ... {chunk[-1]} ended: out of memory?") from error
        finally:
            idle.put(worker)
        if isinstance(answer, OSError):
            raise ReadError(answer.errno, answer.strerror, answer.filename)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with contextlib.ExitStack() as stack:
        # -P: without it this file's folder would be searched for modules
        command = [sys.executable, "-P", __file__, str(image_size)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # or numpy starts a thread a core in each
        for _ in range(num_workers):
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            stack.callback(_end, worker)
            idle.put(worker)
        pool = ThreadPoolExecutor(num_workers)  # one waits for each process
        stack.callback(pool.shutdown, cancel_futures=True)  # after an error or Ctrl-C nobody waits for the rest
        pending: deque[Future[list[bytes | str]]] = deque()
        for chunk in chunks:
            if len(pending) == 2 * num_workers:  # a slow disk does not fill the memory
                yield from pending.popleft().result()
            pending.append(pool.submit(decode_chunk, chunk))
        while pending:
            yield from pending.popleft().result()


def _end(worker: "subprocess.Popen[bytes]") -> None:
    """A worker ends when its pipes are closed."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdout.close()
    with contextlib.suppress(BrokenPipeError):  # it has ended already
        worker.stdin.close()
    worker.wait()


def _decode_chunk(paths: Sequence[Path], image_size: int) -> Iterator[bytes | str]:
    for path in paths:
        try:
            yield decode(path, image_size).tobytes()
        except DecodeError as error:
            yield str(error)


def _serve(image_size: int) -> None:
    """Answer each pickled list of paths on stdin with one of pixels or problems on stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent as well, which then closes stdin
    warnings.simplefilter("ignore")
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            paths = pickle.load(sys.stdin.buffer)
            answer: list[bytes | str] | Exception
            try:
                answer = list(_decode_chunk(paths, image_size))
            except ReadError as error:
                # as a class that the parent knows: here this file is __main__
                answer = OSError(error.errno, error.strerror, error.filename)
            except MemoryError as error:
                answer = error
            pickle.dump(answer, sys.stdout.buffer)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
