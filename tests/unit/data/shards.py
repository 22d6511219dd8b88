"""Which shards a preparation saves, for tests of interruptions."""

from ngpt.data import encode

_SAVE = encode.save_shard


def saved_shards(monkeypatch, interrupted_after: int | None = None) -> list[str]:
    """The names of the shards saved from now on, in order; the one after so many is interrupted instead."""
    made: list[str] = []

    def saving(path, shard):
        if len(made) == interrupted_after:
            raise KeyboardInterrupt
        made.append(path.name)
        _SAVE(path, shard)

    monkeypatch.setattr(encode, "save_shard", saving)
    return made
