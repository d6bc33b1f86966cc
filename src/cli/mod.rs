//! The command line: QSD's options in QSD's words, and our own.
