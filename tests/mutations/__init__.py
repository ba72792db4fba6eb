"""Mutations of GGUF files: `OPERATORS` by name, and what they work on."""

from mutations import arrays as arrays
from mutations import data as data
from mutations import keys as keys
from mutations import model as model
from mutations import raw as raw
from mutations import splits as splits
from mutations import table as table
from mutations import vocabulary as vocabulary
from mutations.operators import OPERATORS as OPERATORS
