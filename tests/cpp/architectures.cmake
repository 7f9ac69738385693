# cmake -P architectures.cmake: which CUDA architectures are built, of an nvcc that does nothing but list what it knows.
cmake_minimum_required(VERSION 3.25)
include(${CMAKE_CURRENT_LIST_DIR}/../../cmake/architectures.cmake)
if(DEFINED asked)  # one choice
  choose_architectures(chosen "${asked}" "${found}" ${nvcc})
  list(JOIN chosen " " chosen)
  message(STATUS "chosen: ${chosen}")
  return()
endif()

# expect(KNOWN ASKED FOUND TEXT...): a choice prints each text.
set(nvcc ${CMAKE_CURRENT_BINARY_DIR}/lists_architectures)
function(expect known asked found)
  list(JOIN known " " known)
  file(WRITE ${nvcc} "#!/bin/sh\n[ \"$*\" = --list-gpu-code ] && printf 'sm_%s\\n' ${known}\n")
  file(CHMOD ${nvcc} PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE)
  execute_process(COMMAND ${CMAKE_COMMAND} "-Dasked=${asked}" "-Dfound=${found}" -Dnvcc=${nvcc} -P ${CMAKE_CURRENT_FUNCTION_LIST_FILE}
    OUTPUT_VARIABLE said ERROR_VARIABLE said)
  string(REGEX REPLACE "[ \n]+" " " said "${said}")  # errors are wrapped
  foreach(text ${ARGN})
    string(FIND "${said}" "${text} " at)
    if(at EQUAL -1)
      message(SEND_ERROR "nvcc of ${known}: asked for \"${asked}\" beside a GPU of \"${found}\" there is no \"${text}\" in\n${said}")
    endif()
  endforeach()
endfunction()

set(cuda12_4 50 52 53 60 61 62 70 72 75 80 86 87 89 90)
set(cuda13 75 80 86 87 88 89 90 100 110 103 120 121)
set(no_gpu "No CUDA devices found.-real")
set(released "75-real;80-real;90;100-real;120-real")

expect("${cuda13}" "" "${no_gpu}" "-- chosen: 80 90")
expect("${cuda13}" "" "86-real" "-- chosen: 86")
expect("${cuda13}" "" "61-real;120-real" "no CUDA kernels for sm_61: they need sm_75 or newer" "-- chosen: 120")
expect("${cuda12_4}" "" "120-real" "no machine code for sm_120, which this nvcc lacks" "-- chosen: 80 90")
expect("${cuda12_4}" "" "61-real" "no CUDA kernels for sm_61: they need sm_75 or newer" "-- chosen: 80 90")
expect("90;100" "" "${no_gpu}" "no machine code for sm_80, which this nvcc lacks" "-- chosen: 90")
expect("${cuda13}" "${released}" "86-real" "-- chosen: 75-real 80-real 90 100-real 120-real")
expect("${cuda12_4}" "${released}" "${no_gpu}" "no machine code for sm_100, sm_120, which this nvcc lacks" "-- chosen: 75-real 80-real 90")
expect("${cuda13}" "70;90a;100f-virtual" "${no_gpu}" "no CUDA kernels for sm_70: they need sm_75 or newer" "-- chosen: 90a 100f-virtual")
expect("" "90" "${no_gpu}" "-- chosen: 90")  # a compiler that does not list
expect("${cuda13}" native "80-real;90-real" "-- chosen: 80-real 90-real")
expect("${cuda13}" all "${no_gpu}" "-- chosen: 75-real 80-real 86-real 87-real 88-real 89-real 90-real 100-real 103-real 110-real 120-real 121")
expect("${cuda12_4}" all-major "${no_gpu}" "no CUDA kernels for sm_50, sm_60, sm_70: they need sm_75 or newer" "-- chosen: 75-real 80-real 90")
foreach(refused 50 120 sm_90 "80,90" native)
  expect("${cuda12_4}" ${refused} "${no_gpu}" "carafepp: CMAKE_CUDA_ARCHITECTURES must be a list such as" "got \"${refused}\"."
    "GPUs of this machine: none. This nvcc knows: 50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90.")
endforeach()

# expect_asked(ASKED WROTE VALUE CUDAARCHS): what counts as asked for where WROTE put VALUE into the cache; it stays when CUDAARCHS is gone.
function(expect_asked expected wrote value environment)
  set(CMAKE_CUDA_ARCHITECTURES "${value}" CACHE STRING "${wrote}" FORCE)
  foreach(now "${environment}" "")
    set(ENV{CUDAARCHS} "${now}")
    asked_architectures(asked)
    if(NOT "${asked}" STREQUAL "${expected}")
      message(SEND_ERROR "\"${value}\" (${wrote}) with CUDAARCHS=${now}: \"${expected}\" is asked for; got \"${asked}\"")
    endif()
  endforeach()
endfunction()

set(cmake "CUDA architectures")  # CMake's words, where a project has the language CUDA
expect_asked("" nobody "" "")
expect_asked(90 nobody "" 90)
expect_asked("80;90" nobody "" "80;90")
expect_asked("" ${cmake} 52 "")
expect_asked("" ${cmake} 52 90)
expect_asked(90 ${cmake} 90 90)
expect_asked(80 user 80 "")
expect_asked(80 user 80 90)
