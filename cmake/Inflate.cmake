# Selects the deflate library: target `spinlock_fast_inflate` defines SPINLOCK_FAST_LIBDEFLATE, SPINLOCK_FAST_ZLIB or neither.
#
# libdeflate decodes 1.5 to 2 times as fast as zlib. Order of preference: the system's libdeflate, the source tree in
# LIBDEFLATE_SOURCE_DIR, zlib. Without any of them the module still builds, and deflated datasets are read through h5py.
set(LIBDEFLATE_SOURCE_DIR "" CACHE PATH "Source tree of libdeflate, compiled in if the system has no libdeflate")

add_library(spinlock_fast_inflate INTERFACE)
find_path(LIBDEFLATE_INCLUDE_DIR libdeflate.h)
find_library(LIBDEFLATE_LIBRARY NAMES deflate)

if(LIBDEFLATE_INCLUDE_DIR AND LIBDEFLATE_LIBRARY)
  message(STATUS "inflate: ${LIBDEFLATE_LIBRARY}")
  target_include_directories(spinlock_fast_inflate INTERFACE ${LIBDEFLATE_INCLUDE_DIR})
  target_link_libraries(spinlock_fast_inflate INTERFACE ${LIBDEFLATE_LIBRARY})
  target_compile_definitions(spinlock_fast_inflate INTERFACE SPINLOCK_FAST_LIBDEFLATE)
elseif(EXISTS "${LIBDEFLATE_SOURCE_DIR}/libdeflate.h")
  message(STATUS "inflate: libdeflate from ${LIBDEFLATE_SOURCE_DIR}")
  enable_language(C)
  # Only decompression is needed.
  set(lib ${LIBDEFLATE_SOURCE_DIR}/lib)
  add_library(spinlock_fast_libdeflate STATIC ${lib}/utils.c ${lib}/adler32.c ${lib}/deflate_decompress.c
    ${lib}/zlib_decompress.c ${lib}/x86/cpu_features.c ${lib}/arm/cpu_features.c)
  set_target_properties(spinlock_fast_libdeflate PROPERTIES POSITION_INDEPENDENT_CODE ON C_VISIBILITY_PRESET hidden)
  target_include_directories(spinlock_fast_libdeflate PUBLIC ${LIBDEFLATE_SOURCE_DIR})
  target_link_libraries(spinlock_fast_inflate INTERFACE spinlock_fast_libdeflate)
  target_compile_definitions(spinlock_fast_inflate INTERFACE SPINLOCK_FAST_LIBDEFLATE)
else()
  find_package(ZLIB)
  if(ZLIB_FOUND)
    message(STATUS "inflate: zlib ${ZLIB_VERSION_STRING}")
    target_link_libraries(spinlock_fast_inflate INTERFACE ZLIB::ZLIB)
    target_compile_definitions(spinlock_fast_inflate INTERFACE SPINLOCK_FAST_ZLIB)
  else()
    message(STATUS "inflate: neither libdeflate nor zlib found; deflated datasets are read through h5py")
  endif()
endif()
