"""Arrays of any kind in, without a copy: views, ragged columns, grids of cells."""
