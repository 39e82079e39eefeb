//! Checks and looks at a delta file without opening it for a volume.
