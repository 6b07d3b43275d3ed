"""Reads the metadata of DCP, a pickle, without running what it may carry."""

import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader, Metadata

from fms.utils.serialization.errors import CheckpointError

ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},  # its name in Python 3.13
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise CheckpointError(f"its pickle asks for {module}.{name}, which is code: refused, none of it was run")
        return super().find_class(module, name)


class SafeReader(FileSystemReader):
    """DCP's reader of a directory, whose metadata can name nothing but what DCP writes, and files inside."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / ".metadata"
        try:
            with file.open("rb") as stream:
                metadata = _Unpickler(stream).load()
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}") from None
        except (pickle.UnpicklingError, EOFError, OSError, ValueError, AttributeError, TypeError, LookupError) as error:
            raise CheckpointError(f"{file}: not DCP's metadata ({type(error).__name__}): damaged or missing") from None
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise CheckpointError(f"{file}: holds no metadata of DCP")
        for place in metadata.storage_data.values():
            if "/" in place.relative_path or place.relative_path.startswith("."):
                raise CheckpointError(f"{file}: names {place.relative_path!r}, which is not a file of the directory")
        return metadata
