"""Where the build puts the native libraries."""
