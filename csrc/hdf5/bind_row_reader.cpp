// Python bindings of the row reader: layouts are dicts, batches are writable buffers.
#include "bind_filters.hpp"
#include "register.hpp"
#include "row_reader.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <stdexcept>

namespace py = pybind11;

namespace spinlock_fast {
namespace {

using Numbers = py::array_t<std::uint64_t, py::array::c_style | py::array::forcecast>;

std::vector<std::uint64_t> numbers(const py::handle& value) {
    const auto array = py::cast<Numbers>(value);
    return {array.data(), array.data() + array.size()};
}

Shard to_shard(const py::dict& description) {
    Shard shard;
    shard.file = py::cast<std::size_t>(description["file"]);
    shard.rows = py::cast<std::uint64_t>(description["rows"]);
    shard.read_by_caller = !description.contains("chunk_rows");
    if (shard.read_by_caller) return shard;
    shard.chunk_rows = py::cast<std::uint64_t>(description["chunk_rows"]);
    shard.byte_swapped = py::cast<bool>(description["swapped"]);
    if (description.contains("preceding")) shard.preceding = py::cast<std::uint64_t>(description["preceding"]);
    shard.contiguous = description.contains("offset");
    if (shard.contiguous) {
        shard.offset = py::cast<std::uint64_t>(description["offset"]);
        return shard;
    }
    if (description.contains("skipped")) shard.skipped = py::cast<std::uint64_t>(description["skipped"]);
    shard.chunk_shape = py::cast<std::vector<std::uint64_t>>(description["chunk_shape"]);
    shard.filters = to_filters(description["filters"]);
    const auto fill = py::cast<std::string>(description["fill"]);
    const auto* first = reinterpret_cast<const std::byte*>(fill.data());
    shard.fill.assign(first, first + fill.size());
    shard.offsets = numbers(description["offsets"]);
    shard.sizes = numbers(description["sizes"]);
    for (const std::uint64_t mask : numbers(description["masks"]))
        shard.masks.push_back(static_cast<std::uint32_t>(mask));
    return shard;
}

Dataset to_dataset(const py::dict& description) {
    Dataset dataset;
    dataset.name = py::cast<std::string>(description["name"]);
    dataset.item_size = py::cast<std::size_t>(description["item_size"]);
    dataset.row_shape = py::cast<std::vector<std::uint64_t>>(description["row_shape"]);
    for (const py::handle shard : description["shards"]) dataset.shards.push_back(to_shard(py::cast<py::dict>(shard)));
    return dataset;
}

FileInfo to_file(const py::dict& description) {
    return {.path = py::cast<std::string>(description["path"]),
            .label = py::cast<std::string>(description["label"]),
            .identity = {.device = py::cast<std::uint64_t>(description["device"]),
                         .inode = py::cast<std::uint64_t>(description["inode"]),
                         .size = py::cast<std::uint64_t>(description["size"]),
                         .mtime_ns = py::cast<std::int64_t>(description["mtime_ns"])}};
}

std::vector<py::buffer_info> writable(const std::vector<py::buffer>& memory) {
    std::vector<py::buffer_info> infos;
    for (const py::buffer& buffer : memory) {
        infos.push_back(buffer.request(true));
        if (!PyBuffer_IsContiguous(infos.back().view(), 'C'))
            throw std::invalid_argument("the memory of a batch must be C-contiguous");
    }
    return infos;
}

std::vector<std::span<std::byte>> spans_of(const std::vector<py::buffer_info>& infos) {
    std::vector<std::span<std::byte>> spans;
    for (const py::buffer_info& info : infos)
        spans.emplace_back(static_cast<std::byte*>(info.ptr), static_cast<std::size_t>(info.size * info.itemsize));
    return spans;
}

// A reader that keeps alive the Python buffers to which its threads write.
class PyRowReader {
public:
    PyRowReader(const std::vector<py::dict>& files, const std::vector<py::dict>& datasets, unsigned threads,
                bool verify_checksums) {
        if (threads == 0) throw std::invalid_argument("threads must be at least 1");
        std::vector<FileInfo> infos;
        for (const py::dict& file : files) infos.push_back(to_file(file));
        std::vector<Dataset> layouts;
        for (const py::dict& dataset : datasets) layouts.push_back(to_dataset(dataset));
        reader_.emplace(std::move(infos), std::move(layouts), RowReader::Options{threads, verify_checksums});
    }

    ~PyRowReader() { close(); }

    void add_batch(std::uint64_t first, std::uint64_t count, const std::vector<py::buffer>& memory) {
        std::vector<py::buffer_info> infos = writable(memory);
        reader().add_batch(first, count, spans_of(infos));
        memory_[first] = std::move(infos);
    }

    void submit(std::uint64_t first, const Numbers& rows) {
        RowReader& reader = this->reader();
        const std::span<const std::uint64_t> all(rows.data(), static_cast<std::size_t>(rows.size()));
        // Sorts `rows` and may wait for the mutex of the threads; no Python API is called.
        const py::gil_scoped_release release;
        reader.submit(first, all);
    }

    void wait(std::uint64_t first) {
        RowReader& reader = this->reader();
        for (bool complete = false; !complete;) {
            try {
                // Other Python threads run while this one waits.
                const py::gil_scoped_release release;
                complete = reader.wait(first, std::chrono::milliseconds(50));
            } catch (const ReadError&) {
                memory_.erase(first);
                throw;
            }
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        }
        memory_.erase(first);
    }

    bool read_cached(std::uint64_t first_row, std::uint64_t count, const std::vector<py::buffer>& memory) {
        RowReader& reader = this->reader();
        const std::vector<py::buffer_info> infos = writable(memory);
        const std::vector<std::span<std::byte>> spans = spans_of(infos);
        // Copying takes about 0.1 ms per MB.
        const py::gil_scoped_release release;
        return reader.read_cached(first_row, count, spans);
    }

    py::dict stats() {
        if (reader_) last_ = reader_->stats();
        py::dict out;
        out["chunks"] = last_.chunks;
        out["stored_bytes"] = last_.stored_bytes;
        out["decoded_bytes"] = last_.decoded_bytes;
        out["cpu_seconds"] = last_.cpu_seconds;
        return out;
    }

    void close() {
        if (!reader_) return;
        last_ = reader_->stats();
        {
            // Joining waits for the tasks in progress.
            const py::gil_scoped_release release;
            reader_.reset();
        }
        memory_.clear();
    }

private:
    RowReader& reader() {
        if (!reader_) throw std::runtime_error("the reader is closed");
        return *reader_;
    }

    std::optional<RowReader> reader_;
    std::map<std::uint64_t, std::vector<py::buffer_info>> memory_;
    ReaderStats last_;
};

}  // namespace

void register_row_reader(py::module_& module) {
    py::register_exception<ReadError>(module, "ReadError", PyExc_RuntimeError);
    py::class_<PyRowReader>(module, "RowReader")
        .def(py::init<const std::vector<py::dict>&, const std::vector<py::dict>&, unsigned, bool>(), py::arg("files"),
             py::arg("datasets"), py::arg("threads"), py::arg("verify_checksums"))
        .def("add_batch", &PyRowReader::add_batch, py::arg("first"), py::arg("count"), py::arg("memory"))
        .def("submit", &PyRowReader::submit, py::arg("first"), py::arg("rows"))
        .def("wait", &PyRowReader::wait, py::arg("first"))
        .def("read_cached", &PyRowReader::read_cached, py::arg("first_row"), py::arg("count"), py::arg("memory"))
        .def("stats", &PyRowReader::stats)
        .def("close", &PyRowReader::close);
}

}  // namespace spinlock_fast
