"""`python -m fairchem_scd.commands`."""

from fairchem_scd.commands import main

main(prog_name="fairchem-scd")
