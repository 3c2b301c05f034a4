// Exceptions for damaged and unreadable data.
#pragma once

#include <stdexcept>

namespace spinlock_fast {

// The stored bytes of a chunk are not valid output of its filters.
struct DecodeError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A filter, or a feature of a stored format, that the decoders do not implement: libhdf5 may read the data.
struct UnsupportedError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Rows cannot be read. The message names file, dataset and position.
struct ReadError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The limit of open files, of the process or of the system, is reached.
struct TooManyFiles : ReadError {
    using ReadError::ReadError;
};

}  // namespace spinlock_fast
