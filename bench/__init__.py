"Benchmarks: run by `make bench`, read by the chapter on speed."
