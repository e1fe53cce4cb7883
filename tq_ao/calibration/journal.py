"""Results of a long run as they come, so that a killed run continues."""

import json
from pathlib import Path
from typing import Any


class Journal:
    """Key -> JSON value, appended to a file line by line.

    The first line is a fingerprint of the run (model, text, settings).  A file with another fingerprint is
    started afresh; a half-written last line is dropped.

    Args:
        path: the file; its directory exists.
        fingerprint: JSON-serialisable description of everything the values depend on.
    """

    def __init__(self, path: str | Path, fingerprint: Any) -> None:
        self.path = Path(path)
        self._values: dict[str, Any] = {}
        header = json.dumps({"fingerprint": fingerprint}, sort_keys=True)
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else []
        if lines and lines[0] == header:
            for line in lines[1:-1]:
                record = json.loads(line)
                self._values[record["key"]] = record["value"]
            whole = lines[:-1]
        else:
            whole = [header]
        self.path.write_text("".join(line + "\n" for line in whole), encoding="utf-8")

    def get(self, key: str) -> Any | None:
        """The value, or None if this key has not been finished."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Store a value and flush it to disk."""
        self._values[key] = value
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "value": value}) + "\n")

    def __len__(self) -> int:
        return len(self._values)
