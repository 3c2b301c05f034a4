// Errors that the data cause.
#pragma once

#include <stdexcept>

namespace spinlock_fast {

// Stored bytes are not what their filters wrote.
struct DecodeError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Rows cannot be read; the text names the file and the place.
struct ReadError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The process, or the system, may not open another file.
struct TooManyFiles : ReadError {
    using ReadError::ReadError;
};

}  // namespace spinlock_fast
