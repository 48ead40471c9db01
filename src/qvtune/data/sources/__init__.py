"""Files, folders and hub data sets -> records, in constant memory.

A record is a row as it is in the file, made as cheaply as possible: one process reads a source from beginning to end
and hands records to others, which make rows and tokens of them (``RowParser`` has no state, both are pickled). That
way any kind of file can be read in parallel, also those that cannot be entered in the middle (gzip, CSV with quoted
line breaks, a JSON list), and a record keeps its file and line.
"""
