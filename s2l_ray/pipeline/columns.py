"""What becomes of the columns of the raw files, as a table for the console."""

from rich.table import Table

from s2l_ray.pipeline.planning import Plan


def columns_table(plan: Plan) -> Table:
    """One line a column and what becomes of it, with the files of which that is true."""
    files: dict[tuple[str, str, str], list[str]] = {}
    for section, by_file in plan.uses.items():
        for file, uses in by_file.items():
            for use in uses:
                files.setdefault((section, use.column, use.becomes), []).append(file)
    table = Table(title="what becomes of the columns, by the first rows of each file")
    for name in ("section", "column", "becomes", "files"):
        table.add_column(name)
    for (section, column, becomes), names in files.items():
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        table.add_row(section, column, becomes, names[0] + more)
    return table
