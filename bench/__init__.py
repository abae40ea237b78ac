"""The harness: turns a suite into records. See README.md in this folder."""
