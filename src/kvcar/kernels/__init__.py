"""Operations on packed pages: one folder each, ``naive.py`` first as the specification."""
