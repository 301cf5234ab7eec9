"""The recipes: short scripts to read, copy and change. Installed they are `hf_sgdr.recipes`."""
