"""The commands of the runtime: capt-predict, capt-bench, capt-build, capt-doctor."""
