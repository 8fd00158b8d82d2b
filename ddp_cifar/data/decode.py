"""Image files as pixels: whatever their size, mode and turn, upright RGB squares come out. On all cores.

Run as a program, this file is the worker that `decode_all` starts: it needs none of the package, and so starts at once.
"""

import contextlib
import itertools
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif"}


CHUNK = 64  # files that a worker is given at a time


class DecodeError(ValueError):
    """A file is not an image that can be used; the message says why."""


def decode(path: Path, image_size: int) -> NDArray[np.uint8]:
    """(image_size, image_size, 3): the short side is scaled to `image_size`, and the middle kept.

    Turned as its EXIF data says; 16-bit greys are scaled to 8 bits; transparent parts become white; of an animation it is
    the first picture. Raises `DecodeError` if the file cannot be decoded, or holds floating-point numbers.
    """
    try:
        with Image.open(path) as image:
            # a large JPEG is decoded at a half, quarter or eighth of its size, still twice what is needed
            image.draft(None, (2 * image_size, 2 * image_size))
            upright = _to_rgb(ImageOps.exif_transpose(image))
            side = min(upright.size)
            left, top = (upright.width - side) / 2, (upright.height - side) / 2
            square = (left, top, left + side, top + side)
            return np.asarray(upright.resize((image_size, image_size), Image.Resampling.BILINEAR, box=square))
    except DecodeError:
        raise
    except Exception as error:  # a decoder may raise anything for a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        # Pillow says "cannot identify image file PATH"; the path is in front already
        raise DecodeError(reason.replace(f" {str(path)!r}", "")) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise DecodeError("it holds floating-point numbers, whose range is not known")
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

    Processes, as most of the work on a small file holds Python's lock: threads would wait for one another.
    """
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    num_workers = min(num_workers, len(chunks))
    if num_workers < 2:
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
            decoded: list[bytes | str] = pickle.load(worker.stdout)
            return decoded
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise RuntimeError(f"a process that decoded {chunk[0]} ... {chunk[-1]} ended: out of memory?") from error
        finally:
            idle.put(worker)

    with contextlib.ExitStack() as stack:
        # -P: without it this file's folder would be searched for modules
        command = [sys.executable, "-P", __file__, str(image_size)]
        for _ in range(num_workers):
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.callback(_end, worker)
            idle.put(worker)
        pool = ThreadPoolExecutor(num_workers)  # one waits for each process
        stack.callback(pool.shutdown, cancel_futures=True)  # after an error or Ctrl-C nobody waits for the rest
        yield from itertools.chain.from_iterable(pool.map(decode_chunk, chunks))


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
    """Answer each pickled list of paths on stdin with one of pixels or errors on stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent as well, which then closes stdin
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            paths = pickle.load(sys.stdin.buffer)
            pickle.dump(list(_decode_chunk(paths, image_size)), sys.stdout.buffer)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
