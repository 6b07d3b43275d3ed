"""Operations of a frozen block, one file each."""
