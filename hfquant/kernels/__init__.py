"""Operations on packed weights, one folder each; see README.md in this folder for how to add one."""
