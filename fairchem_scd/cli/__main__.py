"""`python -m fairchem_scd.cli`."""

from fairchem_scd.cli import main

main(prog_name="fairchem-scd")
