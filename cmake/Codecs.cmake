# Selects the LZ4 and Zstandard libraries: target `spinlock_fast_codecs` defines SPINLOCK_FAST_LZ4 and SPINLOCK_FAST_ZSTD
# for those that were found.
#
# Order of preference: the source tree in CODECS_SOURCE_DIR (C-Blosc with its `internal-complibs`), which is the tested
# version and needs no shared library at run time, then the system's libraries. Datasets that need a missing library are
# read through h5py.
set(CODECS_SOURCE_DIR "" CACHE PATH "Source tree of C-Blosc, whose copies of LZ4 and Zstandard are compiled in")

add_library(spinlock_fast_codecs INTERFACE)
file(GLOB lz4_sources ${CODECS_SOURCE_DIR}/internal-complibs/lz4-*)
file(GLOB zstd_sources ${CODECS_SOURCE_DIR}/internal-complibs/zstd-*)

if(CODECS_SOURCE_DIR AND lz4_sources AND zstd_sources)
  message(STATUS "lz4: ${lz4_sources}")
  message(STATUS "zstd: ${zstd_sources}")
  enable_language(C)
  # Only decompression is needed.
  file(GLOB zstd_files ${zstd_sources}/common/*.c ${zstd_sources}/decompress/*.c)
  add_library(spinlock_fast_codec_sources STATIC ${lz4_sources}/lz4.c ${zstd_files})
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64" AND NOT SANITIZE)
    enable_language(ASM)  # Huffman decoding
    target_sources(spinlock_fast_codec_sources PRIVATE ${zstd_sources}/decompress/huf_decompress_amd64.S)
  else()
    target_compile_definitions(spinlock_fast_codec_sources PRIVATE ZSTD_DISABLE_ASM)
  endif()
  set_target_properties(spinlock_fast_codec_sources PROPERTIES POSITION_INDEPENDENT_CODE ON C_VISIBILITY_PRESET hidden)
  target_compile_definitions(spinlock_fast_codec_sources PRIVATE "ZSTDLIB_VISIBLE=" "ZSTDERRORLIB_VISIBLE=" XXH_NAMESPACE=ZSTD_)
  target_include_directories(spinlock_fast_codec_sources PUBLIC ${lz4_sources} ${zstd_sources})
  target_link_libraries(spinlock_fast_codecs INTERFACE spinlock_fast_codec_sources)
  target_compile_definitions(spinlock_fast_codecs INTERFACE SPINLOCK_FAST_LZ4 SPINLOCK_FAST_ZSTD)
else()
  foreach(codec lz4 zstd)
    string(TOUPPER ${codec} name)
    find_path(${name}_INCLUDE_DIR ${codec}.h)
    find_library(${name}_LIBRARY NAMES ${codec})
    if(${name}_INCLUDE_DIR AND ${name}_LIBRARY)
      message(STATUS "${codec}: ${${name}_LIBRARY}")
      target_include_directories(spinlock_fast_codecs INTERFACE ${${name}_INCLUDE_DIR})
      target_link_libraries(spinlock_fast_codecs INTERFACE ${${name}_LIBRARY})
      target_compile_definitions(spinlock_fast_codecs INTERFACE SPINLOCK_FAST_${name})
    else()
      message(STATUS "${codec}: not found; datasets that need it are read through h5py")
    endif()
  endforeach()
endif()
