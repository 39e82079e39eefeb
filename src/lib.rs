//! Pando.
