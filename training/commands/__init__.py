"""`softcue tune`, `softcue routes calibrate` and `softcue dataset`: the only place that draws progress bars."""
