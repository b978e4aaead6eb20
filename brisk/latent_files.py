"""Writing latents of classes in parts, so that a killed run goes on: shards, two arrays, or one file per image.

A part holds the samples of consecutive images, always the same ones, whoever encodes it; its record in
`.parts/NNNNN.json` is written last. Formats and names are those that `brisk.latents` reads.
Letters: C latent channels, h latent side, N samples.
"""

import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np

from brisk.options import UserError

FORMATS = ("shards", "arrays", "features")


def add_file(tar, name, content):
    """Append bytes to an open tar under `name`, with no time and no owner: equal inputs give equal shards."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def npy_bytes(array):
    """An array as the content of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def replace_file(path, content):
    """Write bytes under a temporary name, then give the file its own."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


class LatentParts:
    """The parts of one output folder."""

    def __init__(self, folder, output_format, name, facts, settings):
        """Args: `name`: prefix of the feature folders; `facts`: the manifest but for the count; `settings`: all that the
        files depend on. UserError if the folder was begun with others. The main process comes first.
        """
        self.folder, self.output_format, self.name, self.facts = Path(folder), output_format, name, facts
        self.parts = self.folder / ".parts"
        self.parts.mkdir(parents=True, exist_ok=True)
        path, text = self.parts / "settings.json", json.dumps(settings, sort_keys=True, indent=1)
        if not path.is_file():
            replace_file(path, text.encode())
        elif path.read_text() != text:
            before = json.loads(path.read_text())
            changed = ", ".join(key for key in sorted({*before, *settings}) if before.get(key) != settings.get(key))
            raise UserError(f"--output_dir {folder} was begun with other settings ({changed}): give an empty folder.")

    def record(self, number):
        """Path of the record of a part, which is there when the part is complete."""
        return self.parts / f"{number:05d}.json"

    def write(self, number, keys, values, labels, skipped):
        """Write one part: sample numbers `keys`, `values` one array per sample, class ids; and {reason: images skipped}.

        Values are moments (2, C, h, h) float16; for features scaled latents (C, h, h) float32.
        """
        getattr(self, f"_write_{self.output_format}")(number, keys, values, labels)
        record = {"labels": labels, "skipped": skipped}
        replace_file(self.record(number), json.dumps(record).encode())

    def _write_shards(self, number, keys, values, labels):
        from brisk.samples import MANIFEST_KEY

        if not keys:
            return
        path = self.folder / f"latents-{number:05d}.tar"
        with tarfile.open(f"{path}.tmp", "w", format=tarfile.USTAR_FORMAT) as tar:
            add_file(tar, f"{MANIFEST_KEY}.json", json.dumps(self.facts).encode())
            for key, value, label in zip(keys, values, labels, strict=True):
                add_file(tar, f"{key:09d}.latent.npy", npy_bytes(value))
                add_file(tar, f"{key:09d}.cls", str(label).encode())
        os.replace(f"{path}.tmp", path)

    def _write_arrays(self, number, keys, values, labels):
        moments = [value.reshape(-1, *value.shape[2:]) for value in values]
        replace_file(self._array(number), npy_bytes(np.stack(moments)) if moments else b"")

    def _array(self, number):
        return self.parts / f"{number:05d}.npy"

    def _write_features(self, number, keys, values, labels):
        folders = [self.folder / f"{self.name}_{kind}" for kind in ("features", "labels")]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        for key, value, label in zip(keys, values, labels, strict=True):
            replace_file(folders[0] / f"{key:09d}.npy", npy_bytes(value[None]))
            replace_file(folders[1] / f"{key:09d}.npy", npy_bytes(np.array([label], np.int64)))

    def finish(self, count):
        """Once all `count` parts are there: join arrays, write the manifest. Returns (samples, {reason: images skipped})."""
        labels, skipped = [], Counter()
        for number in range(count):
            record = json.loads(self.record(number).read_text())
            labels += record["labels"]
            skipped.update(record["skipped"])
        name = f"{self.name}_manifest.json" if self.output_format == "features" else "manifest.json"
        if labels and not (self.folder / name).is_file():
            if self.output_format == "arrays":
                self._join(count, labels)
            content = json.dumps({**self.facts, "count": len(labels)}, indent=1)
            replace_file(self.folder / name, content.encode())
        for path in self.parts.glob("*.npy"):
            path.unlink()
        return len(labels), dict(skipped)

    def _join(self, count, labels):
        """Write labels.npy (N,) and latents.npy (N, 2C, h, h), one part in memory at a time."""
        replace_file(self.folder / "labels.npy", npy_bytes(np.array(labels, np.int64)))
        temporary, whole, start = self.folder / "latents.npy.tmp", None, 0
        for number in range(count):
            if not self._array(number).stat().st_size:
                continue
            part = np.load(self._array(number), allow_pickle=False)
            if whole is None:
                shape = (len(labels), *part.shape[1:])
                whole = np.lib.format.open_memmap(temporary, "w+", part.dtype, shape)
            whole[start : start + len(part)] = part
            start += len(part)
        whole.flush()
        os.replace(temporary, self.folder / "latents.npy")
