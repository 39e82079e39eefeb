//! The command line of `pando`: arguments, a call, text.
