"""What a checkpoint folder holds, whether it is intact, and which of its checkpoints a run takes. No torch, no Megatron.

A folder holds `iter_%07d` folders and a tracker file that names the published one. A save writes into `.saving/iter_%07d`; the folder
gets its own name when every file of it is on the disk and described by its manifest (see `publish`), so an `iter_*` folder is whole
unless something damaged it later.
"""
