"""The commands of python -m pysciml_node."""
