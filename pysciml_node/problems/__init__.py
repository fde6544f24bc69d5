"""Problems: what is asked. A state, an interval, a field; nothing of how it is solved."""
